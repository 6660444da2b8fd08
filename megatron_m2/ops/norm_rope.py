"""RMSNorm, and RMSNorm over a whole projected vector followed by partial RoPE of its heads (M2's QK norm), each one pass.

RMSNorm has one rounding order everywhere: statistics in fp32, cast back to the input's dtype, then multiply by the weight. That is
transformers' order; vLLM and SGLang multiply in fp32 and cast last. One order for training, rollout and export keeps the
log-probabilities of all three equal. RoPE is the rotate-half (NeoX) layout: the first 2 R dimensions of each head turn, the rest pass.

Under tensor parallelism a rank holds some heads of the vector. :func:`row_sum_squares` of its part, all-reduced, is what
:func:`norm_rope` then takes beside the full width. Kernels: ``csrc/norm_rope/``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_m2.ops import _extension
from megatron_m2.ops._checks import check_devices

# Shape suffixes: T tokens, W width = H * D, H heads, D head_dim, R rotated pairs of a head.

Rotary = tuple[Tensor, Tensor]  # cosine and sine, [T, R] each


def rotary_angles(position_T: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Cosine and sine of ``position * theta^(-2i / rotary_dim)``, computed in fp32 (fp64 for fp64) and cast to ``dtype``.

    Args:
        position_T: int [T].

    Returns:
        Two tensors [T, rotary_dim / 2].
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device=position_T.device).to(wide) / rotary_dim
    angle = position_T.to(wide)[:, None] * (1.0 / theta**exponent)[None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def row_sum_squares_reference(x_TW: Tensor) -> Tensor:
    wide = x_TW if x_TW.dtype == torch.float64 else x_TW.float()
    return wide.pow(2).sum(-1)


def norm_rope_reference(x_TW: Tensor, weight_W: Tensor, eps: float, heads: int = 1, rotary: Rotary | None = None,
                        sum_squares_T: Tensor | None = None, full_width: int | None = None) -> Tensor:
    """:func:`norm_rope` in plain torch, differentiated by autograd, in any float dtype."""
    wide = x_TW if x_TW.dtype == torch.float64 else x_TW.float()
    sum_squares_T = row_sum_squares_reference(x_TW) if sum_squares_T is None else sum_squares_T
    rstd_T = torch.rsqrt(sum_squares_T / (full_width or x_TW.shape[1]) + eps)
    out_THD = ((wide * rstd_T[:, None]).to(x_TW.dtype) * weight_W).unflatten(-1, (heads, -1))
    if rotary is None:
        return out_THD
    cos, sin = (x[:, None] for x in rotary)
    first, second, rest = out_THD.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _kernel_takes(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float32) and _extension.available(x.device.type)


def rms_norm(x_TW: Tensor, weight_W: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x_TW: [..., W], bf16 or fp32 (kernel) or another float dtype (reference).
        weight_W: [W], same dtype.
        eps: added to the mean square.

    Returns:
        [..., W] in x's dtype.

    Raises:
        ValueError: the last dimensions, dtypes or devices differ.
    """
    return norm_rope(x_TW.flatten(0, -2), weight_W, eps).view(x_TW.shape)


def row_sum_squares(x_TW: Tensor) -> Tensor:
    """fp32 [T] (fp64 for fp64): sum of the squares of each row, the half of :func:`norm_rope` that ranks add up."""
    return torch.ops.m2_ops.row_sum_squares(x_TW) if _kernel_takes(x_TW) else row_sum_squares_reference(x_TW)


def norm_rope(x_TW: Tensor, weight_W: Tensor, eps: float, heads: int = 1, rotary: Rotary | None = None,
              sum_squares_T: Tensor | None = None, full_width: int | None = None) -> Tensor:
    """``rope(weight * cast(x / sqrt(mean(x^2) + eps)))``, the mean over the whole row, the rotation within each head.

    Args:
        x_TW: [T, W], bf16 or fp32 (kernel) or another float dtype (reference).
        weight_W: [W], same dtype.
        eps: added to the mean square.
        heads: H, of equal width D = W / H.
        rotary: cosine and sine [T, R] in x's dtype, 2 R <= D, from :func:`rotary_angles`: dimensions i and i + R of every head turn
            by the token's angle i. None: no rotation.
        sum_squares_T: fp32 [T], of the full vector where x is one rank's part of it; it gets a gradient.
        full_width: width of that full vector.

    Returns:
        [T, H, D] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument.
    """
    cos, sin = rotary or (None, None)
    _check(x_TW, weight_W, heads, cos, sin)
    _check_split(x_TW, sum_squares_T, full_width)
    if not _kernel_takes(x_TW):
        return norm_rope_reference(x_TW, weight_W, eps, heads, rotary, sum_squares_T, full_width)
    width = x_TW.shape[1]
    out, _ = torch.ops.m2_ops.rms_norm_rope(x_TW, weight_W, eps, heads, cos, sin, sum_squares_T, full_width or width)
    return out.view(-1, heads, width // heads)


def _check(x: Tensor, weight: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, need floats [tokens, width]")
    tokens, width = x.shape
    if weight.shape != (width,) or weight.dtype != x.dtype:
        raise ValueError(f"weight: {weight.dtype} {list(weight.shape)}, need {x.dtype} [{width}]")
    if heads < 1 or width % heads:
        raise ValueError(f"heads: {heads}, need a divisor of the width {width}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is None:
            continue
        if table.dim() != 2 or len(table) != tokens or 2 * table.shape[1] > width // heads or table.dtype != x.dtype:
            raise ValueError(f"{name}: {table.dtype} {list(table.shape)}, need {x.dtype} [{tokens}, R] with 2 R <= {width // heads}")
    check_devices(x, weight=weight, cos=cos, sin=sin)


def _check_split(x: Tensor, sum_squares: Tensor | None, full_width: int | None) -> None:
    tokens, width = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if sum_squares is not None and (sum_squares.dtype != wide or sum_squares.shape != (tokens,)):
        raise ValueError(f"sum_squares: {sum_squares.dtype} {list(sum_squares.shape)}, need {wide} [{tokens}]")
    least = width if full_width is None else full_width
    if least < width or (sum_squares is None and least != width):
        raise ValueError(f"full_width: {full_width}, need {width}{' or more' if sum_squares is not None else ' without sum_squares'}")
    check_devices(x, sum_squares=sum_squares)


# ---- torch.library: shapes for tracing, gradients ---------------------------------------------------------------------------------


def _squares_backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return (2 * grad[:, None] * x).to(x.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.heads, cos, sin, sum_squares, ctx.full_width = inputs
    ctx.split = sum_squares is not None
    ctx.save_for_backward(x, weight, output[1], cos, sin)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, rstd, cos, sin = ctx.saved_tensors
    backward = torch.ops.m2_ops.rms_norm_rope_backward
    dx, d_weight, d_sum_squares = backward(grad, x, weight, rstd, ctx.heads, cos, sin, ctx.split, ctx.full_width)
    return dx, d_weight, None, None, None, None, d_sum_squares if ctx.split else None, None


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None,
                   split: bool, full_width: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), rstd.new_empty(len(x) if split else 0)


def _fake(x: Tensor, weight: Tensor, eps: float, heads: int, cos: Tensor | None, sin: Tensor | None, sum_squares: Tensor | None,
          full_width: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.float32)


if _extension.available():
    torch.library.register_fake("m2_ops::row_sum_squares", lambda x: x.new_empty(len(x), dtype=torch.float32))
    torch.library.register_autograd("m2_ops::row_sum_squares", _squares_backward,
                                    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]))
    torch.library.register_fake("m2_ops::rms_norm_rope", _fake)
    torch.library.register_autograd("m2_ops::rms_norm_rope", _backward, setup_context=_save)
    torch.library.register_fake("m2_ops::rms_norm_rope_backward", _backward_fake)
