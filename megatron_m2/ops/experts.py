"""The routed experts of one layer: permute tokens to rows grouped by expert, SwiGLU per group, weighted sum back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_m2.ops._checks import check_devices
from megatron_m2.ops.grouped_gemm import check_expert_weights, grouped_swiglu
from megatron_m2.ops.grouped_gemm_fp8 import ROW_BLOCK, grouped_swiglu_fp8
from megatron_m2.ops.permute import permute, permute_layout, unpermute

# Shape suffixes: T tokens, H hidden, K experts per token, E experts, F expert width.

_ROW_STEP = 16  # an expert's rows are padded to a tile's step: no product then has a ragged end


def experts_reference(x_TH: Tensor, gate_up_E2FH: Tensor, down_EHF: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
    """The definition, one expert after the other, differentiated by autograd."""
    out = torch.zeros_like(x_TH)
    for e in range(gate_up_E2FH.shape[0]):
        token, slot = (experts_TK == e).nonzero(as_tuple=True)
        gate, up = F.linear(x_TH[token], gate_up_E2FH[e]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down_EHF[e]) * weights_TK[token, slot, None]
        out = out.index_add(0, token, y.to(out.dtype))
    return out


def swiglu_experts(x_TH: Tensor, gate_up_E2FH: Tensor, down_EHF: Tensor, weights_TK: Tensor, experts_TK: Tensor,
                   fp8: bool = False, routed: int | None = None) -> Tensor:
    """``sum_k weights[t, k] * down_e (silu(gate_e x_t) * up_e x_t)`` with e = experts[t, k].

    Args:
        x_TH: [T, H].
        gate_up_E2FH: [E, 2 F, H], gate rows first; down_EHF: [E, H, F]; both in x's dtype.
        weights_TK: fp32 [T, K] (fp64 for fp64); experts_TK: int32 [T, K], each below E; -1: none.
        fp8: the products and their gradients in blockwise FP8 (bf16 only).
        routed: at most so many slots have an expert, default all: memory and time are for so many.

    Returns:
        [T, H] in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, naming the argument.
    """
    check_expert_weights(x_TH, gate_up_E2FH, down_EHF)
    if weights_TK.shape != experts_TK.shape or experts_TK.shape[0] != x_TH.shape[0]:
        raise ValueError(f"experts: {list(experts_TK.shape)}, need the {list(weights_TK.shape)} of weights with {len(x_TH)} tokens")
    check_devices(x_TH, weights=weights_TK, experts=experts_TK)
    layout = permute_layout(experts_TK, len(gate_up_E2FH), ROW_BLOCK if fp8 else _ROW_STEP, routed)
    if fp8:
        return unpermute(grouped_swiglu_fp8(x_TH, gate_up_E2FH, down_EHF, layout), layout, weights_TK)
    rows_RH = grouped_swiglu(permute(x_TH, layout), gate_up_E2FH, down_EHF, layout.ends)
    return unpermute(rows_RH, layout, weights_TK)
