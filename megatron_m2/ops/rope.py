"""Partial rotary position embedding in the rotate-half (NeoX) layout: the first ``rotary_dim`` of each head turn, the rest pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Shape suffixes: T tokens, H heads, D head_dim, R half of rotary_dim.


def rotary_angles(position_T: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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


def _rotate(x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    half = cos_TR.shape[-1]
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = torch.empty_like(x)
    torch.sub(first * cos, second * sin, out=out[..., :half])
    torch.add(second * cos, first * sin, out=out[..., half : 2 * half])
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None  # the inverse of a rotation is its transpose


def apply_rotary(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotates dimensions i and i + R of every head by the token's angle i, for i < R.

    Args:
        x_THD: [T, H, D] in any float dtype.
        cos_TR, sin_TR: [T, R] in the same dtype, from :func:`rotary_angles`.

    Raises:
        ValueError: T differs or 2 R > D.
    """
    if cos_TR.shape[0] != x_THD.shape[0] or 2 * cos_TR.shape[1] > x_THD.shape[2]:
        raise ValueError(f"cos: {list(cos_TR.shape)} does not fit x {list(x_THD.shape)}; need [T, R] with 2 R <= head_dim")
    return _Rotary.apply(x_THD, cos_TR, sin_TR)
