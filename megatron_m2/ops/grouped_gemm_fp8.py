"""Grouped products in blockwise FP8, forward and backward. Kernels: ``csrc/grouped_gemm/`` and ``csrc/quantize/``.

Forward and the gradient by the input take activations per row and 128 columns, the gradient by the weight per column and 128 rows;
weights per 128x128 (DeepSeek-V3, arXiv:2412.19437, section 3.3). Sums over 128 terms are fp32, then multiplied by both factors and
added in fp32. What the backward keeps of an activation are its codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_m2.ops import _extension
from megatron_m2.ops._checks import check_devices
from megatron_m2.ops.fp8 import (
    Quantized,
    dequantize_blocks,
    permute_quantize,
    quantize_rows,
    quantize_rows_columns,
    quantize_weights,
    requantize_columns,
    swiglu_backward_quantize,
    swiglu_quantize,
)
from megatron_m2.ops.grouped_gemm import check_expert_weights, check_groups, group_slices
from megatron_m2.ops.permute import Layout, unpermute
from megatron_m2.ops.weight_grad import now_or_later

# Shape suffixes: R rows grouped by expert, E experts (groups), A and B widths of a product's input and output.

ROW_BLOCK = 128  # groups end on multiples of it, so that no block of 128 rows spans two


def _values(x: Quantized, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return dequantize_blocks(x.codes, x.scales, block).to(dtype)


def grouped_mm_fp8_reference(x: Quantized, w: Quantized, ends_E: Tensor, transposed: bool = True, dtype: torch.dtype = torch.float64
                             ) -> Tensor:
    """What the codes stand for, multiplied group by group in ``dtype``."""
    rows, width = len(x.codes), w.codes.shape[1 if transposed else 2]
    out = torch.zeros(rows, width, dtype=dtype, device=x.codes.device)
    values = _values(x, (1, 128), dtype)
    for e, part in enumerate(group_slices(ends_E)):
        matrix = _values(Quantized(w.codes[e], w.scales[e]), (128, 128), dtype)
        out[part] = values[part] @ (matrix.T if transposed else matrix)
    return out


def grouped_wgrad_fp8_reference(dy: Quantized, x: Quantized, ends_E: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """[E, B, A]: ``dy.T @ x`` of each group, of what the codes stand for."""
    dy_values, x_values = _values(dy, (128, 1), dtype), _values(x, (128, 1), dtype)
    return torch.stack([dy_values[part].T @ x_values[part] for part in group_slices(ends_E)])


def _kernel_runs(x: Tensor, *widths: int) -> bool:
    step = 16 if x.device.type == "cuda" else 2
    return _extension.available(x.device.type) and all(w and w % step == 0 for w in widths)


def grouped_mm_codes(x: Quantized, w: Quantized, ends_E: Tensor, transposed: bool = True) -> Tensor:
    """Rows of group e times ``w[e].T`` (or ``w[e]``), both quantised: bf16 [R, B]; rows beyond the last group give 0.

    Args:
        x: codes [R, A], factors [R, ceil(A / 128)], A even.
        w: codes [E, B, A] (or [E, A, B]), factors per 128x128 as they lie.
        ends_E: int32 [E], one past each group's last row; on a GPU multiples of 128.

    Widths that are no multiple of 16 run as plain torch on a GPU.
    """
    if _kernel_runs(x.codes, *w.codes.shape[1:]):
        out: Tensor = torch.ops.m2_ops.grouped_mm_fp8(*x, *w, ends_E, transposed)
        return out
    return grouped_mm_fp8_reference(x, w, ends_E, transposed, torch.float32).bfloat16()


def grouped_swiglu_codes(x: Quantized, w: Quantized, ends_E: Tensor) -> tuple[Quantized, Tensor]:
    """``silu(gate) * up`` by rows, and hidden = gate | up in bf16 [R, 2 F], of :func:`grouped_mm_codes` by w [E, 2 F, A].

    SwiGLU and its quantisation are fused into the product where F is a multiple of 128; the numbers are the same without.
    """
    if _kernel_runs(x.codes, *w.codes.shape[1:]) and w.codes.shape[1] % (2 * ROW_BLOCK) == 0:
        codes, scales, hidden = torch.ops.m2_ops.grouped_swiglu_fp8(*x, *w, ends_E)
        return Quantized(codes, scales), hidden
    hidden = grouped_mm_codes(x, w, ends_E)
    return swiglu_quantize(hidden), hidden


def grouped_wgrad_codes(dy: Quantized, x: Quantized, ends_E: Tensor) -> Tensor:
    """bf16 [E, B, A]: ``dy.T @ x`` of each group; dy [R, B] and x [R, A] quantised by columns, ends multiples of 128."""
    if _kernel_runs(x.codes, dy.codes.shape[1], x.codes.shape[1]):
        out: Tensor = torch.ops.m2_ops.grouped_wgrad_fp8(*dy, *x, ends_E)
        return out
    return grouped_wgrad_fp8_reference(dy, x, ends_E, torch.float32).bfloat16()


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        codes, weights = quantize_rows(x), quantize_weights(w)
        ctx.save_for_backward(*codes, *weights, ends)
        return grouped_mm_codes(codes, weights, ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x_codes, x_scales, w_codes, w_scales, ends = ctx.saved_tensors
        rows, columns = quantize_rows_columns(dy)
        dx = grouped_mm_codes(rows, Quantized(w_codes, w_scales), ends, transposed=False)
        return dx, grouped_wgrad_codes(columns, requantize_columns(Quantized(x_codes, x_scales)), ends), None


def grouped_mm_fp8(x_RA: Tensor, w_EBA: Tensor, ends_E: Tensor) -> Tensor:
    """:func:`megatron_m2.ops.grouped_gemm.grouped_mm` in FP8: operands are quantised on the way in; differentiable.

    Args:
        x_RA: bf16 [R, A]; w_EBA: bf16 [E, B, A]; A and B even.
        ends_E: int32 [E], multiples of 128 (``permute_layout`` with ``block=128``).

    Returns:
        bf16 [R, B].

    Raises:
        ValueError: shapes, dtypes or ends that do not fit, naming the argument.
    """
    check_groups(x_RA, ends_E, len(w_EBA))
    if x_RA.dtype != torch.bfloat16 or x_RA.shape[1] % 2:
        raise ValueError(f"x: {x_RA.dtype} {list(x_RA.shape)}, need bfloat16 of an even width")
    if w_EBA.dim() != 3 or w_EBA.shape[2] != x_RA.shape[1] or w_EBA.shape[1] % 2 or w_EBA.dtype != x_RA.dtype:
        raise ValueError(f"w: {w_EBA.dtype} {list(w_EBA.shape)} does not fit x {x_RA.dtype} {list(x_RA.shape)}, or has an odd width")
    check_devices(x_RA, w=w_EBA)
    if ends_E.device.type == "cpu" and bool((ends_E % ROW_BLOCK).any()):
        raise ValueError(f"ends: {ends_E.tolist()}, need multiples of {ROW_BLOCK}")
    return _GroupedMM.apply(x_RA, w_EBA, ends_E)


class _GroupedSwiGLU(torch.autograd.Function):
    """Keeps gate and up in bf16, everything else as codes."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, gate_up: Tensor, down: Tensor, *layout: Tensor) -> Tensor:
        ends = Layout(*layout).ends
        x, w_in, w_out = permute_quantize(x_TH, Layout(*layout)), quantize_weights(gate_up), quantize_weights(down)
        act, hidden = grouped_swiglu_codes(x, w_in, ends)
        ctx.save_for_backward(*x, *w_in, *w_out, *act, hidden, *layout)
        ctx.weights = gate_up, down
        return grouped_mm_codes(act, w_out, ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, w_in, w_out, act = (Quantized(*saved[i : i + 2]) for i in range(0, 8, 2))
        hidden, layout = saved[8], Layout(*saved[9:])

        dy_rows, dy_columns = quantize_rows_columns(dy)
        d_down = now_or_later(ctx.weights[1], lambda: grouped_wgrad_codes(dy_columns, requantize_columns(act), layout.ends))
        d_rows, d_columns = swiglu_backward_quantize(grouped_mm_codes(dy_rows, w_out, layout.ends, transposed=False), hidden)
        d_gate_up = now_or_later(ctx.weights[0], lambda: grouped_wgrad_codes(d_columns, requantize_columns(x), layout.ends))
        return unpermute(grouped_mm_codes(d_rows, w_in, layout.ends, transposed=False), layout), d_gate_up, d_down, None, None, None


def grouped_swiglu_fp8(x_TH: Tensor, gate_up_E2FH: Tensor, down_EHF: Tensor, layout: Layout) -> Tensor:
    """:func:`megatron_m2.ops.grouped_gemm.grouped_swiglu` of the permuted tokens in FP8, quantised as they are permuted; differentiable.

    Args:
        x_TH: bf16 [T, H]; gate_up_E2FH: bf16 [E, 2 F, H], gate rows first; down_EHF: bf16 [E, H, F]; H and F even.
        layout: of :func:`megatron_m2.ops.permute.permute_layout` with ``block=128``.

    Returns:
        bf16 [R, H], the layout's rows.

    Raises:
        ValueError: shapes or dtypes that do not fit, naming the argument.
    """
    check_expert_weights(x_TH, gate_up_E2FH, down_EHF)
    if x_TH.dtype != torch.bfloat16 or any(w % 2 for w in down_EHF.shape[1:]):
        raise ValueError(f"x: {x_TH.dtype}, down: {list(down_EHF.shape)}; FP8 needs bfloat16 and even widths")
    return _GroupedSwiGLU.apply(x_TH, gate_up_E2FH, down_EHF, *layout)


if _extension.available():
    torch.library.register_fake("m2_ops::grouped_mm_fp8", lambda x, x_scale, w, w_scale, ends, transposed: x.new_empty(
        (len(x), w.shape[1 if transposed else 2]), dtype=torch.bfloat16))
    torch.library.register_fake("m2_ops::grouped_swiglu_fp8", lambda x, x_scale, w, w_scale, ends: (
        x.new_empty(len(x), w.shape[1] // 2), x_scale.new_empty(len(x), w.shape[1] // 256),
        x.new_empty((len(x), w.shape[1]), dtype=torch.bfloat16)))
    torch.library.register_fake("m2_ops::grouped_wgrad_fp8", lambda dy, dy_scale, x, x_scale, ends: x.new_empty(
        (len(ends), dy.shape[1], x.shape[1]), dtype=torch.bfloat16))
