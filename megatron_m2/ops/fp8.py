"""Blockwise FP8: e4m3 codes with fp32 factors, value = code * factor. Kernels: ``csrc/quantize/``.

Weights have one factor per 128x128 block, as MiniMax-M2 was released (``weight_scale_inv``); activations and gradients one per row and
128 columns (1x128), or per column and 128 rows (128x1) for products that sum over rows: DeepSeek-V3 (arXiv:2412.19437) section 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_m2.ops import _extension
from megatron_m2.ops._checks import check_devices
from megatron_m2.ops.permute import Layout

# Shape suffixes: O outputs, I inputs of a weight; P, Q its blocks along each, ceil(O / block) and ceil(I / block).
# R rows, W width of an activation.

BLOCK = (128, 128)
E4M3 = torch.float8_e4m3fn
_E4M3_MAX = torch.finfo(E4M3).max  # 448


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """(P, Q) of a weight of shape (O, I); a block at the edge may be partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _spread(scale_PQ: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """[O, I]: every weight's own factor."""
    rows = scale_PQ.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def dequantize_blocks(weight_OI: Tensor, scale_PQ: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """``weight * scale`` of its block, fp32 [O, I].

    Args:
        weight_OI: e4m3 [O, I].
        scale_PQ: fp32 [ceil(O / block[0]), ceil(I / block[1])].

    Raises:
        ValueError: the scale does not fit the weight.
    """
    if tuple(scale_PQ.shape) != scale_shape(tuple(weight_OI.shape), block):
        raise ValueError(f"weight_scale_inv: {list(scale_PQ.shape)}, need {list(scale_shape(tuple(weight_OI.shape), block))} for a weight "
                         f"{list(weight_OI.shape)} in blocks of {list(block)}")
    return weight_OI.float().mul_(_spread(scale_PQ.float(), weight_OI.shape, block))


def quantize_blocks(weight_OI: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """Rounds each block to e4m3 with the factor that maps its largest magnitude to 448.

    Returns:
        e4m3 [O, I] and fp32 [P, Q], the factors to multiply by; a block of zeros has factor 1.
    """
    wide = weight_OI.float()
    blocks = scale_shape(tuple(wide.shape), block)
    padded = F.pad(wide, (0, blocks[1] * block[1] - wide.shape[1], 0, blocks[0] * block[0] - wide.shape[0]))
    largest_PQ = padded.abs().view(blocks[0], block[0], blocks[1], block[1]).amax((1, 3))
    scale_PQ = torch.where(largest_PQ == 0, 1.0, largest_PQ / _E4M3_MAX)  # NaN stays NaN
    return (wide / _spread(scale_PQ, wide.shape, block)).to(E4M3), scale_PQ


class Quantized(NamedTuple):
    """Attributes:
        codes: e4m3.
        scales: fp32 factors, one per block.
    """

    codes: Tensor
    scales: Tensor


def quantize_reference(x_RW: Tensor, block: tuple[int, int]) -> Quantized:
    """Any block shape in plain torch; rows and columns of :func:`quantize_rows` and :func:`quantize_columns` are (1, 128) and (128, 1)."""
    return Quantized(*quantize_blocks(x_RW, block))


def _kernel_takes(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and _extension.available(x.device.type)


def _check_rows(name: str, x: Tensor) -> None:
    if x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{name}: {x.dtype} {list(x.shape)}, need bfloat16 or float32 [rows, width]")


def quantize_rows(x_RW: Tensor) -> Quantized:
    """Codes [R, W] and factors [R, ceil(W / 128)] of each row's blocks of 128 columns.

    Raises:
        ValueError: x is not bf16 or fp32 [R, W].
    """
    _check_rows("x", x_RW)
    return Quantized(*torch.ops.m2_ops.quantize_rows(x_RW)) if _kernel_takes(x_RW) else quantize_reference(x_RW, (1, 128))


def quantize_columns(x_RW: Tensor) -> Quantized:
    """Codes [R, W] and factors [ceil(R / 128), W] of each column's blocks of 128 rows; on a GPU a column's codes lie side by side.

    Raises:
        ValueError: x is not bf16 or fp32 [R, W].
    """
    _check_rows("x", x_RW)
    return Quantized(*torch.ops.m2_ops.quantize_columns(x_RW)) if _kernel_takes(x_RW) else quantize_reference(x_RW, (128, 1))


def permute_quantize(x_TW: Tensor, layout: Layout) -> Quantized:
    """:func:`quantize_rows` of the permuted rows, each token quantised once; padding rows are 0 with factor 1.

    Raises:
        ValueError: x is not bf16 or fp32 [T, W] with the layout's T.
    """
    _check_rows("x", x_TW)
    if len(x_TW) != len(layout.row):
        raise ValueError(f"x: {list(x_TW.shape)}, need {len(layout.row)} tokens")
    check_devices(x_TW, layout=layout.token)
    if _kernel_takes(x_TW):
        return Quantized(*torch.ops.m2_ops.permute_quantize(x_TW, layout.token))
    codes, scales = quantize_rows(x_TW)
    token, padding = layout.token.clamp_min(0).long(), (layout.token < 0)[:, None]
    rows = codes.view(torch.uint8)[token].masked_fill(padding, 0).view(E4M3)
    return Quantized(rows, scales[token].masked_fill(padding, 1.0))


def swiglu_quantize(hidden_R2F: Tensor) -> Quantized:
    """:func:`quantize_rows` of ``silu(gate) * up``, hidden = gate | up.

    Raises:
        ValueError: hidden is not bf16 or fp32 [R, 2 F].
    """
    _check_rows("hidden", hidden_R2F)
    if hidden_R2F.shape[1] % 2:
        raise ValueError(f"hidden: width {hidden_R2F.shape[1]}, need an even one")
    if _kernel_takes(hidden_R2F):
        return Quantized(*torch.ops.m2_ops.swiglu_quantize(hidden_R2F))
    gate, up = hidden_R2F.float().chunk(2, dim=-1)
    return quantize_rows((F.silu(gate) * up).to(hidden_R2F.dtype))


def quantize_rows_columns(x_RW: Tensor) -> tuple[Quantized, Quantized]:
    """:func:`quantize_rows` and :func:`quantize_columns`; on a GPU x is read once.

    Raises:
        ValueError: x is not bf16 or fp32 [R, W].
    """
    _check_rows("x", x_RW)
    if not _kernel_takes(x_RW):
        return quantize_rows(x_RW), quantize_columns(x_RW)
    return _pair(torch.ops.m2_ops.quantize_rows_columns(x_RW))


def requantize_columns(rows: Quantized) -> Quantized:
    """:func:`quantize_columns` of what codes by rows stand for, rounded to bf16.

    Args:
        rows: codes [R, W], factors [R, ceil(W / 128)].

    Raises:
        ValueError: the factors do not fit the codes.
    """
    if rows.codes.dtype == E4M3 and _extension.available(rows.codes.device.type):
        return Quantized(*torch.ops.m2_ops.requantize_columns(*rows))
    return quantize_columns(dequantize_blocks(*rows, (1, 128)).bfloat16())


def swiglu_backward_reference(d_act_RF: Tensor, hidden_R2F: Tensor) -> Tensor:
    """Gradient of hidden = gate | up through ``silu(gate) * up``, computed in fp32 (fp64 for fp64), in hidden's dtype."""
    wide = torch.float64 if hidden_R2F.dtype == torch.float64 else torch.float32
    gate, up = hidden_R2F.to(wide).chunk(2, dim=-1)
    share, d_act = gate.sigmoid(), d_act_RF.to(wide)
    d_gate = d_act * up * share * (1 + gate * (1 - share))
    return torch.cat([d_gate, d_act * gate * share], dim=-1).to(hidden_R2F.dtype)


def swiglu_backward_quantize(d_act_RF: Tensor, hidden_R2F: Tensor) -> tuple[Quantized, Quantized]:
    """:func:`quantize_rows_columns` of :func:`swiglu_backward_reference`, which then never exists as a whole on a GPU.

    Raises:
        ValueError: hidden is not bf16 or fp32 [R, 2 F], or d_act not [R, F] of the same.
    """
    _check_rows("hidden", hidden_R2F)
    need = [len(hidden_R2F), hidden_R2F.shape[1] // 2]
    if hidden_R2F.shape[1] % 2 or list(d_act_RF.shape) != need or d_act_RF.dtype != hidden_R2F.dtype:
        raise ValueError(f"d_act: {d_act_RF.dtype} {list(d_act_RF.shape)} does not fit hidden {hidden_R2F.dtype} {list(hidden_R2F.shape)}")
    check_devices(hidden_R2F, d_act=d_act_RF)
    if not _kernel_takes(hidden_R2F):
        return quantize_rows_columns(swiglu_backward_reference(d_act_RF, hidden_R2F))
    return _pair(torch.ops.m2_ops.swiglu_backward_quantize(d_act_RF, hidden_R2F))


def _pair(four: tuple[Tensor, ...]) -> tuple[Quantized, Quantized]:
    return Quantized(*four[:2]), Quantized(*four[2:])


def quantize_weights(w_EBA: Tensor) -> Quantized:
    """128x128 blocks of each of E matrices: codes [E, B, A], factors [E, ceil(B / 128), ceil(A / 128)].

    Raises:
        ValueError: w is not bf16 or fp32 [E, B, A].
    """
    if w_EBA.dim() != 3 or w_EBA.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"w: {w_EBA.dtype} {list(w_EBA.shape)}, need bfloat16 or float32 [matrices, rows, columns]")
    if _kernel_takes(w_EBA):
        return Quantized(*torch.ops.m2_ops.quantize_weights(w_EBA))
    parts = [quantize_blocks(w) for w in w_EBA]
    return Quantized(torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts]))


if _extension.available():

    def _codes(x: Tensor, rows: int, width: int, scales: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return x.new_empty((rows, width), dtype=E4M3), x.new_empty(scales, dtype=torch.float32)

    def _rows(x: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
        width = x.shape[1] if width is None else width
        return _codes(x, len(x), width, (len(x), (width + 127) // 128))

    def _columns(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = _codes(x, len(x), x.shape[1], ((len(x) + 127) // 128, x.shape[1]))
        if x.device.type == "cuda":
            codes = codes.new_empty(x.shape[1], (len(x) + 15) // 16 * 16)[:, : len(x)].t()
        return codes, scales

    torch.library.register_fake("m2_ops::quantize_rows", lambda x: _rows(x))
    torch.library.register_fake("m2_ops::quantize_columns", lambda x: _columns(x))
    torch.library.register_fake("m2_ops::quantize_rows_columns", lambda x: (*_rows(x), *_columns(x)))
    torch.library.register_fake("m2_ops::requantize_columns", lambda codes, scales: _columns(codes))
    torch.library.register_fake("m2_ops::swiglu_backward_quantize", lambda d_act, hidden: (*_rows(hidden), *_columns(hidden)))
    torch.library.register_fake("m2_ops::swiglu_quantize", lambda hidden: _rows(hidden, hidden.shape[1] // 2))
    torch.library.register_fake("m2_ops::quantize_weights", lambda w: (torch.empty_like(w, dtype=E4M3), w.new_empty(
        (len(w), (w.shape[1] + 127) // 128, (w.shape[2] + 127) // 128), dtype=torch.float32)))
    torch.library.register_fake("m2_ops::permute_quantize", lambda x, token: _codes(
        x, len(token), x.shape[1], (len(token), (x.shape[1] + 127) // 128)))
