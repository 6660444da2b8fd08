"""Rows to the ranks of their experts and back, as messages under way: posted, worked beside, waited for.

What a rank receives lies in order of ranks, its own rows last: they never travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_m2.parallel.mesh import Axis

# Shape suffixes: R ranks, C chunks.

Write = Callable[[Sequence[Tensor]], None]  # fills a uint8 [rows, bytes] for each rank; those without rows are left out


class Traffic(Protocol):
    """Rows of one chunk that this rank sends to each rank's experts, and receives from it for its own."""

    @property
    def send(self) -> Sequence[int]: ...
    @property
    def receive(self) -> Sequence[int]: ...
    @property
    def choices(self) -> int:
        """How many of the choices of the rows received are this rank's experts."""


class Message(Protocol):
    """Rows under way."""

    def wait(self) -> Tensor: ...


class Exchange(Protocol):
    """A way for rows to travel among the ranks of an axis. All ranks call the same methods in the same order."""

    axis: Axis

    def traffic(self, counts_RC2: Tensor) -> Sequence[Traffic]:
        """Of each chunk, from the int32 [R, C, 2] rows and choices of each that this rank sends to each rank."""

    def pack(self, write: Write, row_bytes: int, traffic: Traffic, device: torch.device) -> Message:
        """Sends what ``write`` writes to the experts; uint8 [sum(receive), row_bytes] arrive, own rows last."""

    def send_back(self, rows: Tensor, traffic: Traffic) -> Message:
        """Sends [sum(receive), W], which lie as ``pack`` delivers them, to where those came from; [sum(send) - own, W] arrive, and own
        rows are left where they are."""


def by_rank(others: Tensor, own: Tensor, rows: Sequence[int], rank: int) -> list[Tensor]:
    """The part of each rank, ``rows`` long, of what lies as an exchange delivers it."""
    parts = others.split([*rows[:rank], *rows[rank + 1 :]])
    return [*parts[:rank], own, *parts[rank:]]


def split_own(rows: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """Rows of the other ranks, and the ``own`` ones at the end."""
    return rows[: len(rows) - own], rows[len(rows) - own :]


class AllToAll:
    """By ``all_to_all_single`` of the axis' process group: one message of counts for all chunks, one of rows for each."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def traffic(self, counts_RC2: Tensor) -> Sequence[Traffic]:
        counts = _Counts(counts_RC2, self.axis)
        return [_Chunk(counts, chunk) for chunk in range(counts_RC2.shape[1])]

    def pack(self, write: Write, row_bytes: int, traffic: Traffic, device: torch.device) -> Message:
        rank, own = self.axis.rank, traffic.send[self.axis.rank]
        nothing = torch.empty(0, row_bytes, dtype=torch.uint8, device=device)
        sent = nothing.new_empty(sum(traffic.send) - own, row_bytes)
        write(by_rank(sent, nothing, traffic.send, rank))  # while the counts travel
        rows = nothing.new_empty(sum(traffic.receive), row_bytes)
        others, mine = split_own(rows, own)
        work = self._post(others, sent, traffic.receive, traffic.send)
        write([mine if r == rank else nothing for r in range(self.axis.size)])  # while the rows travel
        return _Message(rows, work, sent)

    def send_back(self, rows: Tensor, traffic: Traffic) -> Message:
        own = traffic.send[self.axis.rank]
        others, _ = split_own(rows, own)
        arriving = rows.new_empty(sum(traffic.send) - own, rows.shape[1])
        return _Message(arriving, self._post(arriving, others, traffic.send, traffic.receive), others)

    def _post(self, arriving: Tensor, sent: Tensor, receive: Sequence[int], send: Sequence[int]) -> dist.Work:
        receive, send = list(receive), list(send)
        receive[self.axis.rank] = send[self.axis.rank] = 0
        return _all_to_all(arriving, sent, self.axis, receive, send)


def _all_to_all(arriving: Tensor, sent: Tensor, axis: Axis, receive: list[int] | None = None, send: list[int] | None = None) -> dist.Work:
    work = dist.all_to_all_single(arriving, sent, receive, send, group=axis.group, async_op=True)
    assert work is not None, "this rank is not in the group"
    return work


class _Message:
    def __init__(self, rows: Tensor, work: dist.Work, sent: Tensor) -> None:
        self._rows, self._work, self._sent = rows, work, sent  # what is sent must not be freed before it has gone

    def wait(self) -> Tensor:
        self._work.wait()
        return self._rows


class _Counts:
    """Rows and choices of each chunk from rank to rank, [2][C][R]. Those to receive arrive while the first rows are packed."""

    def __init__(self, counts_RC2: Tensor, axis: Axis) -> None:
        sent = counts_RC2.contiguous()
        arriving = torch.empty_like(sent)
        self._message: _Message | None = _Message(arriving, _all_to_all(arriving, sent, axis), sent)
        self.send: list[list[list[int]]] = sent.permute(2, 1, 0).tolist()
        self._receive: list[list[list[int]]] = []

    @property
    def receive(self) -> list[list[list[int]]]:
        if self._message is not None:
            self._receive, self._message = self._message.wait().permute(2, 1, 0).tolist(), None
        return self._receive


@dataclass(frozen=True)
class _Chunk:
    counts: _Counts
    chunk: int

    @property
    def send(self) -> Sequence[int]:
        return self.counts.send[0][self.chunk]

    @property
    def receive(self) -> Sequence[int]:
        return self.counts.receive[0][self.chunk]

    @property
    def choices(self) -> int:
        return sum(self.counts.receive[1][self.chunk])
