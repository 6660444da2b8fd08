"""Experts over ranks: a token travels once to every rank that has one of its experts, and one sum comes back.

All k choices of a token on one rank share a message row (DeepEP does the same between nodes), so what travels is at most
min(k, ranks) rows per token each way, with no padding to a worst case. Hidden state, weights and experts of a row are one message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m2.ops.expert_parallel import combine_rows, dequantize_rows, pack_rows, plan_rows
from megatron_m2.ops.fp8 import E4M3, quantize_rows
from megatron_m2.parallel.exchange import AllToAll, Exchange, Message, Traffic, by_rank, split_own
from megatron_m2.parallel.mesh import Axis

# Shape suffixes: T tokens of this rank, H hidden, K experts per token, R ranks; M tokens that came.

# x [M, H] (rows may lie apart), weights [M, K], experts int32 [M, K] among this rank's, -1 for those of other ranks -> [M, H], the
# weighted sum; the int is how many of the M * K slots have an expert
LocalExperts = Callable[[Tensor, Tensor, Tensor, int], Tensor]

_ALIGNMENT = 16  # bytes at which the parts of a message row begin: what a GPU moves in one piece


def expert_parallel(x_TH: Tensor, weights_TK: Tensor, experts_TK: Tensor, num_experts: int, axis: Axis, local: LocalExperts, *,
                    fp8_payload: bool = False, chunks: int = 1, exchange: Exchange | None = None) -> Tensor:
    """``sum_k weights[t, k] * expert[t, k](x[t])``, experts split over the axis: rank r has [r E / R, (r + 1) E / R).

    Args:
        x_TH: bf16, fp32 or fp64 [T, H]; weights_TK: fp32 [T, K] (fp64 for fp64); experts_TK: int32 [T, K] of all ``num_experts``, -1:
            none; T differs from rank to rank and may be 0.
        local: this rank's experts, called once per chunk.
        fp8_payload: x travels in blocks of 128 e4m3 codes with fp32 factors; the sums and all gradients travel in x's dtype
            (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). Own tokens are rounded alike, so the result does not depend on the ranks.
        chunks: parts of the tokens; one travels while the experts of the one before compute, in the backward too.
        exchange: how rows travel, default :class:`~megatron_m2.parallel.exchange.AllToAll`.

    Returns:
        [T, H], differentiable in x and the weights.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit, naming the argument.
    """
    _check(x_TH, weights_TK, experts_TK, fp8_payload, chunks)
    if axis.size == 1:
        return local(x_TH, weights_TK, experts_TK, experts_TK.numel())
    exchange = exchange or AllToAll(axis)
    parts = [x.tensor_split(chunks) for x in (x_TH, weights_TK, experts_TK)]
    plans = [plan_rows(experts, num_experts, axis.size) for experts in parts[2]]
    traffics = exchange.traffic(torch.stack([plan.counts for plan in plans], 1))
    row = _MessageRow.of(x_TH, weights_TK, num_experts // axis.size, fp8_payload)
    trips = [_Trip(exchange, traffic, row) for traffic in traffics]
    leave = [partial(_Send.apply, *chunk) for chunk in zip(*parts, (plan.row for plan in plans), trips, strict=True)]
    under_way, returning = leave[0](), []
    for i, trip in enumerate(trips):
        # The next chunk is sent before this one is waited for. Autograd runs its nodes in the reverse of this order, which overlaps too.
        arriving, under_way = under_way, leave[i + 1]() if i + 1 < chunks else None
        x_MH, weights_MK, experts_MK = _Arrive.apply(arriving, trip)
        returning.append(_Return.apply(local(x_MH, weights_MK, experts_MK, trip.traffic.choices), trip))
    sums = [_Sum.apply(link, plan.row, trip) for link, plan, trip in zip(returning, plans, trips, strict=True)]
    return sums[0] if chunks == 1 else torch.cat(sums)


def _check(x: Tensor, weights: Tensor, experts: Tensor, fp8_payload: bool, chunks: int) -> None:
    if x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, need bfloat16, float32 or float64 [tokens, hidden]")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weights.dim() != 2 or len(weights) != len(x) or weights.dtype != wide:
        raise ValueError(f"weights: {weights.dtype} {list(weights.shape)}, need {wide} [{len(x)}, top_k]")
    if experts.shape != weights.shape or experts.dtype != torch.int32:
        raise ValueError(f"experts: {experts.dtype} {list(experts.shape)}, need torch.int32 {list(weights.shape)}")
    if fp8_payload and x.dtype == torch.float64:
        raise ValueError("fp8_payload: True, but x is torch.float64; need bfloat16 or float32")
    if chunks < 1:
        raise ValueError(f"chunks: {chunks}, need 1 or more")


class _MessageRow(NamedTuple):
    """What one message row holds: x or its codes and factors, weights, experts, each from the next multiple of 16 bytes on."""

    columns: tuple[tuple[int, torch.dtype], ...]  # width and dtype of each part
    at: tuple[int, ...]
    size: int
    dtype: torch.dtype
    experts: int  # of one rank

    @classmethod
    def of(cls, x: Tensor, weights: Tensor, experts: int, fp8: bool) -> _MessageRow:
        width, top_k = x.shape[1], weights.shape[1]
        hidden = [(width, E4M3), (-(-width // 128), torch.float32)] if fp8 else [(width, x.dtype)]
        columns = (*hidden, (top_k, weights.dtype), (top_k, torch.int32))
        *at, size = accumulate((-(-n * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for n, dtype in columns), initial=0)
        return cls(columns, tuple(at), size, x.dtype, experts)

    @property
    def fp8(self) -> bool:
        return len(self.columns) == 4

    def writer(self, x: Tensor, weights: Tensor, experts: Tensor, row: Tensor) -> Callable[[Sequence[Tensor]], None]:
        parts = [*quantize_rows(x), weights] if self.fp8 else [x, weights]
        return partial(pack_rows, parts, experts, row, self.experts, self.at)

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, weights and experts; x a view of the message where nothing needs computing."""
        *hidden, weights, experts = (rows[:, at : at + n * dtype.itemsize].view(dtype)
                                     for at, (n, dtype) in zip(self.at, self.columns, strict=True))
        # the weights are kept for the backward: a view would keep the whole message with them
        return dequantize_rows(*hidden).to(self.dtype) if self.fp8 else hidden[0], weights.contiguous(), experts


class _Trip:
    """One chunk's way to the experts and back, then that of its gradients. What is under way from one node of autograd to the next is
    kept here and not by the node, so that under activation checkpointing no message stays in memory until the backward."""

    def __init__(self, exchange: Exchange, traffic: Traffic, row: _MessageRow) -> None:
        self.exchange, self.traffic, self.row = exchange, traffic, row
        self._packed: Message | None = None
        self._sent: list[tuple[Message, Tensor]] = []  # messages, and own rows that stayed

    def pack(self, write: Callable[[Sequence[Tensor]], None], row_bytes: int, device: torch.device) -> None:
        self._packed = self.exchange.pack(write, row_bytes, self.traffic, device)

    def packed(self) -> Tensor:
        assert self._packed is not None
        rows, self._packed = self._packed.wait(), None
        return rows

    def send_back(self, *tensors: Tensor) -> None:
        own = self.traffic.send[self.exchange.axis.rank]
        self._sent = [(self.exchange.send_back(rows, self.traffic), split_own(rows, own)[1]) for rows in tensors]

    def sums(self, row_TR: Tensor) -> list[Tensor]:
        """Each token's sum of what was sent back."""
        sent, self._sent = self._sent, []
        return [combine_rows(by_rank(message.wait(), own, self.traffic.send, self.exchange.axis.rank), row_TR) for message, own in sent]


# Four nodes of autograd: the rows leave, arrive, leave again, arrive. What links two of them is an empty tensor.


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, experts: Tensor, row: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        ctx.save_for_backward(row)
        trip.pack(trip.row.writer(x, weights, experts, row), trip.row.size, x.device)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        dx, d_weights = ctx.trip.sums(*ctx.saved_tensors)
        return dx, d_weights, None, None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, trip: _Trip) -> tuple[Tensor, Tensor, Tensor]:
        ctx.trip = trip
        x, weights, experts = trip.row.read(trip.packed())
        ctx.mark_non_differentiable(experts)
        return x, weights, experts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, d_weights: Tensor, _: Tensor) -> tuple[Tensor, None]:
        ctx.trip.send_back(dx.contiguous(), d_weights.contiguous())
        return dx.new_empty(0), None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, trip: _Trip) -> Tensor:
        ctx.trip, ctx.dtype = trip, y.dtype
        trip.send_back(y.contiguous())
        return y.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.packed().view(ctx.dtype), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, link: Tensor, row: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        ctx.save_for_backward(row)
        return trip.sums(row)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (row,) = ctx.saved_tensors
        ctx.trip.pack(partial(pack_rows, [grad], None, row, ctx.trip.row.experts, [0]), grad.shape[1] * grad.element_size(), grad.device)
        return grad.new_empty(0), None, None
