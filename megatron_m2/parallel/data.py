"""Data parallelism: gradients accumulated in fp32 and summed over each weight's replicas in buckets, while the backward goes on.

The order in which a rank starts reductions follows from the calls to :meth:`GradientBuckets.before_backward` and from the order of the
weights alone, never from the order in which gradients arrive or from whether they do, so that it is the same on every rank of a group:
a bucket that is complete waits for those before it.

Why this cannot deadlock with the collectives of the backward itself (tensor, expert and context parallelism): the buckets have groups
of their own, so nothing else is ordered against them. With NCCL each group has a stream of its own; a reduction there waits for the
compute stream, and the compute stream waits for it in :meth:`GradientBuckets.finish` only, so the backward always reaches its own
collectives. What a waiting reduction holds meanwhile is its channels' thread blocks, and as a stream runs one kernel at a time that is
one kernel per group: far from a whole GPU. ZeRO-2 also waits in the backward, for the reduction two buckets back: there the ranks must
meet the same gradients and collectives in the same order (then the rank that is furthest behind can always go on), so each backward
must give every weight a gradient, zeros where a rank had no tokens for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_m2.parallel.box import Box, boxed
from megatron_m2.parallel.collectives import all_gather_single, reduce_scatter_single
from megatron_m2.parallel.mesh import Axis, Mesh
from megatron_m2.parallel.placement import placement_of
from megatron_m2.parallel.sharding import Cut, Replicas, Sharding, replica_groups

# Shape suffixes: S shards of a bucket, W elements of one of them (the largest box of each weight, one after the other).


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of gradients, masters and moments: fp32, fp64 for fp64 weights."""
    return torch.promote_types(dtype, torch.float32)


class Bucket:
    """Weights of one dtype and one grid of replicas, whose gradients are summed together.

    Attributes:
        names, parameters: of the weights, in order of arrival.
        replicas: who has them.
        awaited: those whose gradient completes the microbatch and has not come.
        armed: those for whom the coming gradient completes it, until all are and the bucket is queued.
        queued: whether its reduction is in the queue.
        rounds: reductions started in this step.
        every_microbatch: whether each microbatch's gradients are reduced apart (ZeRO-2).
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], replicas: Replicas, zero: int) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.replicas, self.every_microbatch = replicas, zero == 2 and replicas.shards.size > 1
        self.cuts = [Cut.of(tuple(p.shape), replicas.shards.size) for p in self.parameters]
        self.starts = [sum(c.width for c in self.cuts[:i]) for i in range(len(self.cuts) + 1)]
        self.dtype, self.device = self.parameters[0].dtype, self.parameters[0].device
        self.awaited: set[int] = set()
        self.armed: set[int] = set()
        self.queued, self.rounds = False, 0
        self._sums_SW: Tensor | None = None
        self._stale: set[int] = set()  # whose part of the sums is an earlier step's
        self._in_flight: tuple[Any, Tensor, Tensor] | None = None
        self._shard_W: Tensor | None = None

    # ---- gradients ----------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, index: int) -> None:
        """Moves a weight's gradient into the sums."""
        p = self.parameters[index]
        assert p.grad is not None
        assert self.every_microbatch or self.rounds == 0, \
            f"a gradient of {self.names[index]} came after its sum was reduced: before_backward(last=True) was called too early"
        if self._sums_SW is None:
            self._sums_SW = self._new_sums()
        stale = index in self._stale
        for boxes, rows in self.cuts[index].pairs(p.grad, self._columns(self._sums_SW, index)):
            rows.copy_(boxes) if stale else rows.add_(boxes)
        self._stale.discard(index)
        p.grad = None

    def start(self) -> None:
        """Starts the reduction of what was added since the last one. ZeRO-2: the sums' memory goes with it."""
        shards, copies = self.replicas.shards, self.replicas.copies
        sums_SW = self._new_sums() if self._sums_SW is None else self._sums_SW
        for index in self._stale:  # no gradient came: it is zero
            self._columns(sums_SW, index).zero_()
        self.wait()
        work, out_W = None, sums_SW[0]
        if shards.size > 1:
            out_W = torch.empty_like(sums_SW[0])
            work = reduce_scatter_single(out_W, sums_SW.view(-1), group=shards.group, async_op=True)
        elif copies.size > 1:
            work = dist.all_reduce(out_W, group=copies.group, async_op=True)
        self._in_flight = work, out_W, sums_SW  # the last only to keep it alive
        if self.every_microbatch:
            self._sums_SW = None
        else:
            self._sums_SW, self._stale = sums_SW, set(range(len(self.parameters)))
        self.awaited.clear()
        self.queued, self.rounds = False, self.rounds + 1

    def wait(self) -> None:
        """For the reduction under way, whose result joins the shard."""
        if self._in_flight is None:
            return
        work, out_W, _ = self._in_flight
        if work is not None:
            work.wait()
        self._shard_W = out_W if self._shard_W is None else self._shard_W.add_(out_W)
        self._in_flight = None

    def sum_over_copies(self) -> Any:
        """Hybrid sharding: the shard's sum over the ranks that keep the same one; returns what to wait for."""
        self.wait()
        if self.replicas.shards.size == 1 or self.replicas.copies.size == 1:
            return None
        return dist.all_reduce(self._shard_W, group=self.replicas.copies.group, async_op=True)

    def unreduced(self) -> bool:
        """Whether gradients of ZeRO-2 came after the last reduction."""
        return self.every_microbatch and self._sums_SW is not None

    def gradients(self) -> list[Tensor]:
        """This rank's box of each weight's gradient, valid until :meth:`reset`."""
        assert self._shard_W is not None
        return self.boxes(self._shard_W)

    def reset(self) -> None:
        """Forgets the step's gradients."""
        self._shard_W, self.rounds = None, 0

    # ---- weights ------------------------------------------------------------------------------------------------------------------

    def new_shard(self) -> Tensor:
        """[W] with this rank's boxes of the weights, in the dtype of accumulation."""
        shard_W = torch.zeros(self.starts[-1], dtype=accumulation_dtype(self.dtype), device=self.device)
        for index, (p, box) in enumerate(zip(self.parameters, self.boxes(shard_W), strict=True)):
            box.copy_(self.mine(index, p.detach()))
        return shard_W

    def mine(self, index: int, tensor: Tensor) -> Tensor:
        """This rank's box of a tensor of a weight's shape, a view."""
        cut = self.cuts[index]
        start, stop = cut.bounds(self.replicas.shards.rank)
        return tensor.narrow(cut.dim, start, stop - start)

    def boxes(self, shard_W: Tensor) -> list[Tensor]:
        """Each weight's box in such a shard, a view."""
        shapes = [cut.box(self.replicas.shards.rank) for cut in self.cuts]
        return [shard_W[at : at + torch.Size(shape).numel()].view(shape) for at, shape in zip(self.starts, shapes, strict=False)]

    def start_gather(self, shard_W: Tensor) -> tuple[Any, Tensor]:
        """Starts to collect all ranks' shards in the weights' dtype; for :meth:`finish_gather`."""
        shards = self.replicas.shards
        if shards.size == 1:
            return None, shard_W[None]
        all_SW = torch.empty(shards.size, self.starts[-1], dtype=self.dtype, device=self.device)
        return all_gather_single(all_SW.view(-1), shard_W.to(self.dtype), group=shards.group, async_op=True), all_SW

    @torch.no_grad()
    def finish_gather(self, work: Any, all_SW: Tensor) -> None:
        """Writes what was collected into the weights, rounding."""
        if work is not None:
            work.wait()
        for index, (p, cut) in enumerate(zip(self.parameters, self.cuts, strict=True)):
            for boxes, rows in cut.pairs(p, self._columns(all_SW, index)):
                boxes.copy_(rows)

    def _new_sums(self) -> Tensor:
        return torch.zeros(self.replicas.shards.size, self.starts[-1], dtype=accumulation_dtype(self.dtype), device=self.device)

    def _columns(self, rows_SW: Tensor, index: int) -> Tensor:
        return rows_SW[:, self.starts[index] : self.starts[index + 1]]

    def boxed(self, index: int, local: Tensor) -> Tensor | Box:
        """``local``, of the shape of this rank's box of a weight, at its place in the whole weight."""
        p, cut = self.parameters[index], self.cuts[index]
        placement = placement_of(p)
        offsets = list(placement.offsets(p.dim()))
        offsets[cut.dim] += cut.bounds(self.replicas.shards.rank)[0]
        return boxed(local, tuple(offsets), placement.whole_shape(tuple(p.shape)))


class GradientBuckets:
    """The buckets of a rank's weights, in the order in which a backward completes them.

    A gradient is moved into its bucket when the backward has it (a hook), and freed. A weight that has no replicas and is as wide as
    its sum needs no bucket: ``.grad`` is its sum. Building this is collective over the mesh.

    Args:
        named: weights in the order of the forward; ranks that share a weight list those they share in the same order.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], mesh: Mesh, sharding: Sharding) -> None:
        self.sharding = sharding
        named = list(named)
        axes: dict[str, Axis] = {name: placement_of(p).axis(mesh) for name, p in named}
        grids = replica_groups(mesh, dict.fromkeys(placement_of(p).replicas for _, p in named), sharding)
        self.bare = {n: p for n, p in named if axes[n].size == 1 and p.dtype == accumulation_dtype(p.dtype)}
        self.buckets = _fill([(n, p) for n, p in named if n not in self.bare], grids, sharding)
        self._queue: deque[Bucket] = deque()
        self._recent: deque[Bucket] = deque()  # reductions under way of ZeRO-2
        for bucket in self.buckets:
            for index, p in enumerate(bucket.parameters):
                p.register_post_accumulate_grad_hook(lambda p, bucket=bucket, index=index: self._arrived(bucket, index))

    def before_backward(self, last: bool, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """The next gradient of these weights (all, if none are named) completes a microbatch, and if it is the ``last`` of the step,
        their sum: buckets are reduced as they become complete, under ZeRO-2 in every microbatch. Ranks of a group call this alike.

        A pipeline names the weights of the chunk whose backward comes. Without this call everything is reduced by :meth:`finish`.
        """
        chosen = None if parameters is None else {id(p) for p in parameters}
        for bucket in self.buckets:
            if not (last or bucket.every_microbatch):
                continue
            members = {i for i, p in enumerate(bucket.parameters) if chosen is None or id(p) in chosen}
            while members and bucket.queued:  # of an earlier microbatch in which some gradient did not come
                self._start(self._queue.popleft())
            bucket.armed |= members
            bucket.awaited |= members
            if members and len(bucket.armed) == len(bucket.parameters):
                self._enqueue(bucket)

    def gather(self) -> None:
        """Moves gradients that were written without a hook (by a zero-bubble pipeline) into the sums; does nothing when there are none."""
        for bucket in self.buckets:
            for index, p in enumerate(bucket.parameters):
                if p.grad is not None:
                    self._arrived(bucket, index)

    def finish(self) -> None:
        """Reduces what is left and waits: :meth:`Bucket.gradients` are then those of the step, until :meth:`reset`."""
        self.gather()
        for bucket in self.buckets:
            if not bucket.queued and (bucket.rounds == 0 or bucket.armed):
                self._enqueue(bucket)
        while self._queue:
            self._start(self._queue.popleft())
        late = [b.names[0] for b in self.buckets if b.unreduced()]
        assert not late, f"gradients came after their microbatch was reduced, in the bucket of {late[0]}: before_backward was not called"
        for work in [bucket.sum_over_copies() for bucket in self.buckets]:
            if work is not None:
                work.wait()
        self._recent.clear()

    def reset(self) -> None:
        """Forgets the step's gradients."""
        for bucket in self.buckets:
            bucket.reset()
        for p in self.bare.values():
            p.grad = None

    def _arrived(self, bucket: Bucket, index: int) -> None:
        if bucket.parameters[index].grad is None:
            return  # an op left it for later: torch runs the hook all the same
        bucket.add(index)
        bucket.awaited.discard(index)
        while self._queue and not self._queue[0].awaited:
            self._start(self._queue.popleft())

    def _enqueue(self, bucket: Bucket) -> None:
        bucket.queued = True
        bucket.armed.clear()
        self._queue.append(bucket)

    def _start(self, bucket: Bucket) -> None:
        bucket.start()
        if bucket.every_microbatch:  # two under way at most: each holds the memory of its sums
            self._recent.append(bucket)
            if len(self._recent) > 2:
                self._recent.popleft().wait()


def _fill(named: Sequence[tuple[str, nn.Parameter]], grids: dict[str, Replicas], sharding: Sharding) -> list[Bucket]:
    """Weights from the last to the first, those of a kind together up to the bucket's size; ordered by their last arrival."""
    kinds: dict[tuple[str, torch.dtype, torch.device], list[list[int]]] = {}
    for index in reversed(range(len(named))):
        p = named[index][1]
        groups = kinds.setdefault((placement_of(p).replicas, p.dtype, p.device), [[]])
        size = sum(named[i][1].numel() for i in groups[-1]) + p.numel()
        if groups[-1] and size * accumulation_dtype(p.dtype).itemsize > sharding.bucket_bytes:
            groups.append([])
        groups[-1].append(index)
    filled = sorted((g for groups in kinds.values() for g in groups), key=lambda g: g[-1], reverse=True)
    return [_bucket([named[i] for i in group], grids, sharding.zero) for group in filled]


def _bucket(named: Sequence[tuple[str, nn.Parameter]], grids: dict[str, Replicas], zero: int) -> Bucket:
    replicas = placement_of(named[0][1]).replicas
    # An embedding's replicas lie on two pipeline stages. The earlier one has a microbatch's gradient only after the later one is through
    # with that microbatch: waiting for their sum in a backward, as ZeRO-2 does, would be waiting for oneself.
    return Bucket(named, grids[replicas], min(zero, 1) if replicas == "embedding" else zero)
