"""Rows written straight into the memory of the other GPUs of a node: CUDA IPC, over NVLink. Kernels: ``csrc/expert_parallel/``.

Every rank has a buffer of two slots that all ranks have opened. The n-th message of an exchange goes through slot n % 2: the sender
waits until all have taken message n - 2, writes its rows behind those of the lower ranks, and signals; the receiver waits for all
signals, takes the rows out and says so. All of this runs on the current stream.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_m2.parallel.collectives import gather_rows
from megatron_m2.parallel.exchange import AllToAll, Message, Traffic, Write, by_rank, split_own
from megatron_m2.parallel.mesh import Axis

# Shape suffixes: R ranks, C chunks.

_ALIGNMENT = 256
_log = logging.getLogger(__name__)


def peer_memory(axis: Axis, slot_bytes: int, device: torch.device) -> PeerMemory | None:
    """Opens the buffers; every rank of the axis calls it. None, with one line that says why, where the ranks cannot reach each other.

    Args:
        slot_bytes: what one message may bring one rank; a longer one travels by all-to-all instead.

    Raises:
        ValueError: slot_bytes is not positive.
    """
    if slot_bytes < 1:
        raise ValueError(f"slot_bytes: {slot_bytes}, need 1 or more")
    size = _header(axis.size) + 2 * _round_up(slot_bytes)
    handle, obstacle = None, None
    buffers: list[Tensor] = []
    try:
        own = torch.ops.m2_ops.peer_alloc(size, device)
        handle = torch.ops.m2_ops.peer_handle(own)
    except (RuntimeError, AttributeError) as error:  # no such memory, or no such kernel
        obstacle = _first_line(error)
    offers = _gathered((_boot(), handle), axis)
    if len({boot for boot, _ in offers}) > 1:
        obstacle = "the ranks are on several nodes"
    elif all(other is not None for _, other in offers):
        try:
            for rank, (_, other) in enumerate(offers):
                buffers.append(own if rank == axis.rank else torch.ops.m2_ops.peer_open(other, size, device))
        except RuntimeError as error:  # no peer access
            obstacle = _first_line(error)
    obstacles = [o for o in _gathered(obstacle, axis) if o is not None]
    if obstacles:
        if axis.rank == 0:
            _log.warning("experts' rows travel by all-to-all, not through peer memory: %s", obstacles[0])
        return None
    return PeerMemory(axis, buffers, _round_up(slot_bytes))


def _gathered(mine: Any, axis: Axis) -> list[Any]:
    everyone: list[Any] = [None] * axis.size
    dist.all_gather_object(everyone, mine, group=axis.group)
    return everyone


def _boot() -> str:
    """Of this machine, the same for all its processes, containers included."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _round_up(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def _header(ranks: int) -> int:
    """Bytes of the flags: which message each rank has written here, and which of this rank's it has taken."""
    return _round_up(16 * ranks)


class PeerMemory:
    """The :class:`~megatron_m2.parallel.exchange.Exchange` through peer memory. Made by :func:`peer_memory`."""

    def __init__(self, axis: Axis, buffers: Sequence[Tensor], slot_bytes: int) -> None:
        self.axis = axis
        self._buffers, self._slot_bytes = list(buffers), slot_bytes
        self._by_messages = AllToAll(axis)
        self._count = 0
        self._under_way: deque[_Written] = deque()
        flags = [b[: 16 * axis.size].view(torch.int64) for b in buffers]
        mine = axis.rank
        self._written, self._taken = flags[mine].chunk(2)
        self._say_written = [f[mine : mine + 1] for f in flags]
        self._say_taken = [f[axis.size + mine : axis.size + mine + 1] for f in flags]

    def close(self) -> None:
        """Gives the memory back; every rank calls it."""
        if self._written.is_cuda:
            torch.cuda.synchronize(self._written.device)
        for views in (self._buffers, self._say_written, self._say_taken):
            views.clear()
        dist.barrier(group=self.axis.group)  # nobody frees what another has open
        self._written = self._taken = torch.empty(0)

    def traffic(self, counts_RC2: Tensor) -> Sequence[Traffic]:
        ranks, chunks = self.axis.size, counts_RC2.shape[1]
        everyone = gather_rows(counts_RC2, self.axis, [ranks] * ranks).view(ranks, ranks, chunks, 2).permute(2, 3, 0, 1).tolist()
        return [_Matrix(rows, choices, self.axis.rank) for rows, choices in everyone]

    def pack(self, write: Write, row_bytes: int, traffic: Traffic, device: torch.device) -> Message:
        assert isinstance(traffic, _Matrix)
        if not self._fits(traffic.rows, row_bytes):
            return self._by_messages.pack(write, row_bytes, traffic, device)
        rows = torch.empty(sum(traffic.receive), row_bytes, dtype=torch.uint8, device=device)
        others, mine = split_own(rows, traffic.send[self.axis.rank])
        there = self._begin(traffic.rows, row_bytes)
        there[self.axis.rank] = mine
        write(there)
        return self._end(rows, others)

    def send_back(self, rows: Tensor, traffic: Traffic) -> Message:
        assert isinstance(traffic, _Matrix)
        row_bytes, back = rows.shape[1] * rows.element_size(), [list(column) for column in zip(*traffic.rows, strict=True)]
        if not self._fits(back, row_bytes):
            return self._by_messages.send_back(rows, traffic)
        own = traffic.send[self.axis.rank]
        others, _ = split_own(rows, own)
        arriving = rows.new_empty(sum(traffic.send) - own, rows.shape[1])
        there = self._begin(back, row_bytes)
        for target, block in zip(there, by_rank(others, others[:0], traffic.receive, self.axis.rank), strict=True):
            target.view(rows.dtype).copy_(block)
        return self._end(arriving, arriving)

    def _fits(self, rows: Sequence[Sequence[int]], row_bytes: int) -> bool:
        """Every rank comes to the same answer."""
        most = max(sum(rows[s][r] for s in range(self.axis.size) if s != r) for r in range(self.axis.size))
        return most * row_bytes <= self._slot_bytes

    def _slot(self, buffer: Tensor, message: int) -> Tensor:
        start = _header(self.axis.size) + message % 2 * self._slot_bytes
        return buffer[start : start + self._slot_bytes]

    def _begin(self, rows: Sequence[Sequence[int]], row_bytes: int) -> list[Tensor]:
        """Where this rank's rows for each rank go, rows[s][r] being those from s to r; none for itself."""
        mine = self.axis.rank
        self._count += 1
        while self._under_way and self._under_way[0].number <= self._count - 2:
            self._under_way[0].take()
        torch.ops.m2_ops.peer_wait(self._taken, self._count - 2)
        there = []
        for r, buffer in enumerate(self._buffers):
            first, count = sum(rows[s][r] for s in range(mine) if s != r), 0 if r == mine else rows[mine][r]
            there.append(self._slot(buffer, self._count)[first * row_bytes : (first + count) * row_bytes].view(count, row_bytes))
        return there

    def _end(self, rows: Tensor, others: Tensor) -> Message:
        torch.ops.m2_ops.peer_signal(self._say_written, self._count)
        message = _Written(self, self._count, rows, others)
        self._under_way.append(message)
        return message

    def take_next(self) -> None:
        """The rows of the oldest message, out of its slot."""
        message = self._under_way.popleft()
        torch.ops.m2_ops.peer_wait(self._written, message.number)
        slot = self._slot(self._buffers[self.axis.rank], message.number)
        message.others.copy_(slot[: message.others.nbytes].view(message.others.dtype).view(message.others.shape))
        torch.ops.m2_ops.peer_signal(self._say_taken, message.number)
        message.taken = True


@dataclass
class _Written:
    memory: PeerMemory
    number: int
    rows: Tensor
    others: Tensor
    taken: bool = False

    def take(self) -> None:
        while not self.taken:  # in the order of writing, so that "taken up to here" is one number
            self.memory.take_next()

    def wait(self) -> Tensor:
        self.take()
        return self.rows


@dataclass(frozen=True)
class _Matrix:
    """Rows, and choices among them, from every rank to every other."""

    rows: list[list[int]]
    choices_of: list[list[int]]
    rank: int

    @property
    def send(self) -> Sequence[int]:
        return self.rows[self.rank]

    @property
    def receive(self) -> Sequence[int]:
        return [of[self.rank] for of in self.rows]

    @property
    def choices(self) -> int:
        return sum(of[self.rank] for of in self.choices_of)
