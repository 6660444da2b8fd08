"""Gradients of weights, at once or later.

The stage before waits for the gradient of an input, nobody for that of a weight; a zero-bubble pipeline leaves the second kind for when
it would otherwise wait. Ops that make a weight's gradient with a product of its own ask :func:`now_or_later`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Left = list[tuple[nn.Parameter, Callable[[], Tensor]]]


class Later:
    """Takes what the backward of these weights' ops would compute, while :meth:`collecting`."""

    def __init__(self, weights: Iterable[nn.Parameter]) -> None:
        self.left: Left | None = None
        for weight in weights:
            weight.later = self  # type: ignore[attr-defined]

    @contextmanager
    def collecting(self) -> Iterator[Left]:
        """What backwards in this block leave; to be given to :func:`compute_left`."""
        left: Left = []
        self.left = left
        try:
            yield left
        finally:
            self.left = None


def now_or_later(weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
    """The gradient of a weight; None where it is left for later."""
    later: Later | None = getattr(weight, "later", None)
    if later is None or later.left is None:
        return compute()
    assert isinstance(weight, nn.Parameter)
    later.left.append((weight, compute))
    return None


def compute_left(left: Left) -> None:
    """Computes what was left and adds it to the weights' gradients, as a backward does: hooks on the weights run."""
    for weight, compute in left:
        with torch.no_grad():
            grad = compute()
        torch.autograd.backward(weight, grad)
    left.clear()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for x [..., A] and weight [B, A] of one dtype, whose weight gradient may be left for later."""
    return F.linear(x, weight) if getattr(weight, "later", None) is None else _Linear.apply(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        return dy @ weight, now_or_later(weight, lambda: dy.flatten(0, -2).t() @ x.flatten(0, -2))


class Linear(nn.Linear):
    """A bias-free map by :func:`linear`."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, bias=False, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight)
