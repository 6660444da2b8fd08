"""Log-probabilities of chosen tokens straight from hidden states, vocabulary logits in chunks of tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Shape suffixes: N predictions, H hidden, V vocabulary.

_CHUNK = 1024  # predictions whose fp32 logits exist at one time


def linear_logprobs_reference(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
    """``log_softmax(hidden @ weight.T)[target]`` in fp32 (fp64 for fp64), differentiated by autograd."""
    wide = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    return F.linear(hidden_NH, weight_VH).to(wide).log_softmax(-1).gather(1, targets_N[:, None]).squeeze(1)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logits = F.linear(hidden, weight)
        normaliser = logits.new_empty(len(targets), dtype=wide)
        buffer = logits.new_empty(min(_CHUNK, len(targets)), logits.shape[1], dtype=wide)
        for start in range(0, len(targets), _CHUNK):
            rows = slice(start, start + _CHUNK)
            chunk = buffer[: len(targets) - start].copy_(logits[rows])
            torch.logsumexp(chunk, -1, out=normaliser[rows])
        ctx.save_for_backward(hidden, weight, targets, logits, normaliser)
        return logits.gather(1, targets[:, None]).squeeze(1).to(wide) - normaliser

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets, logits, normaliser = ctx.saved_tensors
        d_logits = torch.empty_like(logits)  # a second backward must find the logits unchanged
        buffer = logits.new_empty(min(_CHUNK, len(targets)), logits.shape[1], dtype=normaliser.dtype)
        for start in range(0, len(targets), _CHUNK):
            rows = slice(start, start + _CHUNK)
            probs = buffer[: len(targets) - start]
            torch.sub(logits[rows], normaliser[rows, None], out=probs).exp_().mul_(-grad[rows, None])
            probs.scatter_add_(1, targets[rows, None], grad[rows, None])
            d_logits[rows] = probs
        return d_logits @ weight, d_logits.t() @ hidden, None


def linear_logprobs(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
    """``log p(target)`` of each row under ``softmax(hidden @ weight.T)``.

    Args:
        hidden_NH: [N, H]; weight_VH: [V, H], same dtype; the product rounds to that dtype, everything after it is fp32 (fp64).
        targets_N: int64 [N], each below V.

    Returns:
        fp32 [N] (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes or dtypes that do not fit, naming the argument.
    """
    if weight_VH.shape[1:] != hidden_NH.shape[1:] or weight_VH.dtype != hidden_NH.dtype:
        raise ValueError(f"weight: {weight_VH.dtype} {list(weight_VH.shape)} does not fit hidden {hidden_NH.dtype} {list(hidden_NH.shape)}")
    if targets_N.shape != hidden_NH.shape[:1] or targets_N.dtype != torch.int64:
        raise ValueError(f"targets: {targets_N.dtype} {list(targets_N.shape)}, need torch.int64 [{hidden_NH.shape[0]}]")
    return _LinearLogprobs.apply(hidden_NH, weight_VH, targets_N)
