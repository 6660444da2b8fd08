"""RMSNorm with one rounding order everywhere: statistics in fp32, cast back to the input's dtype, then multiply by the weight.

That is transformers' order; vLLM and SGLang multiply in fp32 and cast last. One order for training, rollout and export keeps the
log-probabilities of all three equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Shape suffixes: T tokens, D normalised width.


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The formula, differentiated by autograd: ``weight * cast(x / sqrt(mean(x^2) + eps))``."""
    wide = x_TD.double() if x_TD.dtype == torch.float64 else x_TD.float()
    return weight_D * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x_TD.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        normed = (x if x.dtype == torch.float64 else x.float()) * rstd
        grad_weight = (grad * normed).sum(tuple(range(x.dim() - 1))).to(weight.dtype)
        grad_normed = (grad * weight).to(normed.dtype)
        mean = (grad_normed * normed).sum(-1, keepdim=True).div_(x.shape[-1])
        return normed.mul_(mean).sub_(grad_normed).mul_(-rstd).to(x.dtype), grad_weight, None


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension.

    Args:
        x_TD: [..., D], any float dtype.
        weight_D: [D], same dtype.
        eps: added to the mean square.

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: the last dimensions or the dtypes differ.
    """
    if weight_D.shape != x_TD.shape[-1:] or weight_D.dtype != x_TD.dtype:
        raise ValueError(f"weight: {weight_D.dtype} {list(weight_D.shape)}, need {x_TD.dtype} [{x_TD.shape[-1]}]")
    return _RMSNorm.apply(x_TD, weight_D, eps)
