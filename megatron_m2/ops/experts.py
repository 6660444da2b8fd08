"""The routed experts: permute tokens to expert-contiguous rows, three products and SwiGLU per expert, weighted sum back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape suffixes: T tokens, H hidden, K experts per token, E experts, F expert width,
# R rows grouped by expert: T * K and padding.


def experts_reference(x_TH: Tensor, gate_up_E2FH: Tensor, down_EHF: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
    """The definition, one expert after the other, differentiated by autograd."""
    out = torch.zeros_like(x_TH)
    for e in range(gate_up_E2FH.shape[0]):
        token, slot = (experts_TK == e).nonzero(as_tuple=True)
        gate, up = F.linear(x_TH[token], gate_up_E2FH[e]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down_EHF[e]) * weights_TK[token, slot, None]
        out = out.index_add(0, token, y.to(out.dtype))
    return out


def _grouped_mm(x_RA: Tensor, w_EBA: Tensor, ends: list[int], transpose: bool) -> Tensor:
    """Rows of group e times ``w[e].T`` (or ``w[e]`` when not ``transpose``)."""
    out = x_RA.new_empty(x_RA.shape[0], w_EBA.shape[1 if transpose else 2])
    for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > start:
            torch.mm(x_RA[start:end], w_EBA[e].t() if transpose else w_EBA[e], out=out[start:end])
    return out


def _grouped_wgrad(dy_RB: Tensor, x_RA: Tensor, ends: list[int]) -> Tensor:
    """[E, B, A]: per group ``dy.T @ x``; a group without rows gives zeros."""
    out = x_RA.new_zeros(len(ends), dy_RB.shape[1], x_RA.shape[1])
    for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > start:
            torch.mm(dy_RB[start:end].t(), x_RA[start:end], out=out[e])
    return out


# Rows of an expert are padded to this many, so that products come in few shapes: oneDNN compiles a kernel for every new one.
_ROW_BLOCK = 64


class _Layout(NamedTuple):
    """Where the T * K routed rows lie when grouped by expert; rows of one expert keep token order, so sums repeat bit for bit.

    Attributes:
        ends: of each expert's rows, padding included.
        token_R: int64 [R], token of each row; padding rows read token 0 and count for nothing.
        row_TK: int64 [T * K], row of each (token, slot).
    """

    ends: list[int]
    token_R: Tensor
    row_TK: Tensor


def _layout(experts_TK: Tensor, num_experts: int) -> _Layout:
    flat = experts_TK.flatten()
    block = _ROW_BLOCK if flat.numel() >= _ROW_BLOCK * num_experts else 1
    counts = torch.bincount(flat, minlength=num_experts)
    padded = (counts + block - 1) // block * block
    ends = padded.cumsum(0)
    order = flat.argsort(stable=True)
    shift = (ends - padded) - (counts.cumsum(0) - counts)  # of each expert's first row, by the padding before it
    row_sorted = torch.arange(flat.numel(), device=flat.device) + shift[flat[order]]
    ends_list = ends.tolist()
    token_R = torch.zeros(ends_list[-1], dtype=torch.int64, device=flat.device).index_copy(0, row_sorted, order // experts_TK.shape[1])
    return _Layout(ends_list, token_R, torch.empty_like(order).index_copy(0, order, row_sorted))


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        ends, token_R, row = _layout(experts, gate_up.shape[0])
        x_R = x.index_select(0, token_R)
        hidden_R = _grouped_mm(x_R, gate_up, ends, transpose=True)
        gate, up = hidden_R.chunk(2, dim=-1)
        act_R = F.silu(gate).mul_(up)
        y_R = _grouped_mm(act_R, down, ends, transpose=True)
        y = y_R.index_select(0, row).unflatten(0, experts.shape)
        ctx.save_for_backward(x_R, hidden_R, act_R, y, gate_up, down, weights, token_R, row)
        ctx.ends = ends
        return torch.bmm(weights.to(y.dtype).unsqueeze(1), y).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x_R, hidden_R, act_R, y, gate_up, down, weights, token_R, row = ctx.saved_tensors
        d_weights = torch.bmm(y, grad.unsqueeze(2)).squeeze(2).to(weights.dtype)
        weight_R = grad.new_zeros(len(token_R)).index_copy(0, row, weights.flatten().to(grad.dtype))  # 0 for padding rows
        dy_R = grad.index_select(0, token_R).mul_(weight_R.unsqueeze(1))
        d_down = _grouped_wgrad(dy_R, act_R, ctx.ends)
        d_act = _grouped_mm(dy_R, down, ctx.ends, transpose=False)
        gate, up = hidden_R.chunk(2, dim=-1)
        d_hidden = torch.empty_like(hidden_R)
        d_gate, d_up = d_hidden.chunk(2, dim=-1)
        torch.mul(d_act, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward(d_act.mul_(up), gate, grad_input=d_gate)
        d_gate_up = _grouped_wgrad(d_hidden, x_R, ctx.ends)
        dx_R = _grouped_mm(d_hidden, gate_up, ctx.ends, transpose=False)
        dx = dx_R.index_select(0, row).unflatten(0, weights.shape).sum(1)
        return dx, d_gate_up, d_down, d_weights, None


def swiglu_experts(x_TH: Tensor, gate_up_E2FH: Tensor, down_EHF: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
    """``sum_k weights[t, k] * down_e (silu(gate_e x_t) * up_e x_t)`` with e = experts[t, k].

    Args:
        x_TH: [T, H].
        gate_up_E2FH: [E, 2 F, H], gate rows first; down_EHF: [E, H, F]; both in x's dtype.
        weights_TK: fp32 [T, K] (fp64 allowed); experts_TK: integer [T, K], each below E.

    Returns:
        [T, H] in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, naming the argument.
    """
    num_experts, double_width, hidden = gate_up_E2FH.shape
    if x_TH.shape[1] != hidden or gate_up_E2FH.dtype != x_TH.dtype:
        raise ValueError(f"gate_up: {gate_up_E2FH.dtype} {list(gate_up_E2FH.shape)} does not fit x {x_TH.dtype} {list(x_TH.shape)}")
    if down_EHF.shape != (num_experts, hidden, double_width // 2) or down_EHF.dtype != x_TH.dtype:
        raise ValueError(f"down: {down_EHF.dtype} {list(down_EHF.shape)}, need {x_TH.dtype} {[num_experts, hidden, double_width // 2]}")
    if weights_TK.shape != experts_TK.shape or experts_TK.shape[0] != x_TH.shape[0] or experts_TK.is_floating_point():
        raise ValueError(f"experts: {experts_TK.dtype} {list(experts_TK.shape)}, need integers like weights {list(weights_TK.shape)}")
    return _Experts.apply(x_TH, gate_up_E2FH, down_EHF, weights_TK, experts_TK.long())
