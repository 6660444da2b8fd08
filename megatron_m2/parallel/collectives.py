"""Differentiable collectives. Each is a linear map of all ranks' rows, and its backward is that map's transpose.

So a loss is the sum of every rank's own share, each rank differentiates its share, and the gradient of a weight is the sum over the
ranks that hold it: nothing is divided by a number of ranks anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_m2.parallel.mesh import Axis

# torch 2.13 renamed them
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

# ---- rows ------------------------------------------------------------------------------------------------------------------------


def gather_rows(x: Tensor, axis: Axis, rows: Sequence[int]) -> Tensor:
    """All ranks' rows, one rank after the other: [sum(rows), ...]. ``rows``: how many each rank has."""
    return x if axis.size == 1 else _Gather.apply(x, axis, tuple(rows))


def scatter_sum_rows(x: Tensor, axis: Axis, rows: Sequence[int]) -> Tensor:
    """The sum over ranks of x [sum(rows), ...], of which each rank gets its own part."""
    return x if axis.size == 1 else _ScatterSum.apply(x, axis, tuple(rows))


def all_sum(x: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks, on every rank."""
    return x if axis.size == 1 else _AllSum.apply(x, axis)


def exchange_rows(x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Sends the first ``send[0]`` rows to rank 0, the next to rank 1 and so on; returns what came, in order of ranks."""
    return x if axis.size == 1 else _Exchange.apply(x, axis, tuple(send), tuple(receive))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, rows: tuple[int, ...]) -> Tensor:
        ctx.axis, ctx.rows = axis, rows
        return _gather(x, axis, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scatter_sum(grad, ctx.axis, ctx.rows), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, rows: tuple[int, ...]) -> Tensor:
        ctx.axis, ctx.rows = axis, rows
        return _scatter_sum(x, axis, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.axis, ctx.rows), None, None


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return total(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return total(grad, ctx.axis), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, send: tuple[int, ...], receive: tuple[int, ...]) -> Tensor:
        ctx.axis, ctx.send, ctx.receive = axis, send, receive
        return all_to_all(x, axis, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(grad, ctx.axis, ctx.receive, ctx.send), None, None, None


# ---- without gradients -------------------------------------------------------------------------------------------------------------


def total(x: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks."""
    if axis.size == 1:
        return x
    out = x.contiguous().clone()
    dist.all_reduce(out, group=axis.group)
    return out


def highest(x: Tensor, axis: Axis) -> Tensor:
    """The largest over ranks, elementwise."""
    if axis.size == 1:
        return x
    out = x.contiguous().clone()
    dist.all_reduce(out, dist.ReduceOp.MAX, group=axis.group)
    return out


def all_to_all(x: Tensor, axis: Axis, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """:func:`exchange_rows` of any dtype."""
    if axis.size == 1:
        return x
    assert len(x) == sum(send), f"{len(x)} rows for {sum(send)} to send"
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=axis.group)
    return out


def _gather(x: Tensor, axis: Axis, rows: tuple[int, ...]) -> Tensor:
    assert len(x) == rows[axis.rank], f"{len(x)} rows, of which there should be {rows[axis.rank]}"
    if min(rows) == max(rows):
        out = x.new_empty((sum(rows), *x.shape[1:]))
        all_gather_single(out, x.contiguous(), group=axis.group)
        return out
    return all_to_all(x.repeat(axis.size, *[1] * (x.dim() - 1)), axis, [len(x)] * axis.size, rows)


def _scatter_sum(x: Tensor, axis: Axis, rows: tuple[int, ...]) -> Tensor:
    if min(rows) == max(rows):
        out = x.new_empty((rows[0], *x.shape[1:]))
        reduce_scatter_single(out, x.contiguous(), group=axis.group)
        return out
    mine = rows[axis.rank]
    return all_to_all(x, axis, rows, [mine] * axis.size).unflatten(0, (axis.size, mine)).sum(0)
