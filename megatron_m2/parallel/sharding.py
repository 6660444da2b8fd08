"""How a weight's optimizer state is cut over the ranks that hold the weight (its replicas): sizes, process groups, rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_m2.parallel.layout import part
from megatron_m2.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class Sharding:
    """ZeRO (Rajbhandari et al. 2020), hybrid where ``ranks`` says so.

    Attributes:
        zero: 0, every replica keeps whole states and gradients are all-reduced; 1, states are cut over the replicas and gradients
            reduce-scattered once a step; 2, also the gradients' sum: each microbatch's are reduce-scattered and added.
        bucket_bytes: gradients of about so many bytes (fp32) are reduced together.
        ranks: states are cut over so many neighbouring replicas and repeated over the others (0: over all). Where a weight has fewer
            replicas, over those.

    Raises:
        ValueError: on construction and in :meth:`shards`, one line with the field, its value and what is legal.
    """

    zero: int = 1
    bucket_bytes: int = 128 << 20
    ranks: int = 0

    def __post_init__(self) -> None:
        if self.zero not in (0, 1, 2):
            raise ValueError(f"sharding.zero = {self.zero}: must be 0, 1 or 2; nearest is {min(max(self.zero, 0), 2)}")
        if self.bucket_bytes < 1:
            raise ValueError(f"sharding.bucket_bytes = {self.bucket_bytes}: must be at least 1")
        if self.ranks < 0 or (self.zero == 0 and self.ranks):
            legal = "0 where zero = 0" if self.zero == 0 else "at least 0"
            raise ValueError(f"sharding.ranks = {self.ranks}: must be {legal}; nearest is 0")

    def shards(self, replicas: int, name: str) -> int:
        """Over how many of its replicas (those of mesh axis ``name``) a weight's state is cut."""
        if self.zero == 0:
            return 1
        if self.ranks == 0 or self.ranks >= replicas:
            return replicas
        if replicas % self.ranks:
            nearest = min((n for n in range(1, replicas + 1) if replicas % n == 0), key=lambda n: (abs(n - self.ranks), n))
            raise ValueError(f'sharding.ranks = {self.ranks}: must divide the {replicas} replicas of axis "{name}"; nearest is {nearest}')
        return self.ranks


@dataclass(frozen=True)
class Replicas:
    """A weight's replicas as a grid: ``shards`` ranks have a part of its state each, ``copies`` ranks have the same part."""

    shards: Axis
    copies: Axis


def replica_groups(mesh: Mesh, names: Iterable[str], sharding: Sharding) -> dict[str, Replicas]:
    """The grid of every axis of replicas named. All ranks of the mesh call it together.

    The groups are made for this alone, so that a reduction in the background never meets another collective of its group: what a
    group carries is then ordered by the buckets only. Axes of the same ranks share one.
    """
    mine: dict[str, tuple[list[int], list[int]]] = {}
    for name in names:
        axis: Axis = getattr(mesh, name)
        shards = sharding.shards(axis.size, name)
        ranks = dist.get_process_group_ranks(axis.group) if axis.size > 1 else [mesh.world.rank]
        first = axis.rank // shards * shards
        mine[name] = ranks[first : first + shards], ranks[axis.rank % shards :: shards]
    if mesh.alone:
        return {name: Replicas(Axis(), Axis()) for name in mine}
    everybody: list[dict[str, tuple[list[int], list[int]]]] = [{} for _ in range(mesh.world.size)]
    dist.all_gather_object(everybody, mine, group=mesh.world.group)
    rows = sorted({tuple(ranks) for each in everybody for grid in each.values() for ranks in grid if len(ranks) > 1})
    axes = {ranks: dist.new_group(list(ranks)) for ranks in rows}  # every rank makes every group, in the same order

    def axis_of(ranks: list[int]) -> Axis:
        return Axis(len(ranks), ranks.index(mesh.world.rank), axes[tuple(ranks)]) if len(ranks) > 1 else Axis()

    return {name: Replicas(axis_of(shards), axis_of(copies)) for name, (shards, copies) in mine.items()}


@dataclass(frozen=True)
class Cut:
    """A tensor in as many boxes as there are shards: nearly equal parts of one dimension, the first ones larger by one row.

    Attributes:
        shape: of the tensor. dim: along which it is cut. shards: how many boxes; some are empty where there are fewer rows.
    """

    shape: tuple[int, ...]
    dim: int
    shards: int

    @classmethod
    def of(cls, shape: tuple[int, ...], shards: int) -> Cut:
        """Along the dimension that gives the smallest largest box; the first of equals, whose rows lie together."""
        dim = min(range(len(shape)), key=lambda d: (-(-shape[d] // shards) / max(1, shape[d]), d))
        return cls(shape, dim, shards)

    def bounds(self, shard: int) -> tuple[int, int]:
        """[start, stop) along ``dim``."""
        return part(self.shape[self.dim], self.shards, shard)

    def box(self, shard: int) -> tuple[int, ...]:
        """Shape of one box."""
        start, stop = self.bounds(shard)
        return (*self.shape[: self.dim], stop - start, *self.shape[self.dim + 1 :])

    @property
    def width(self) -> int:
        """Elements of the largest box."""
        return math.prod(self.box(0))

    def pairs(self, tensor: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the same shape of ``tensor`` and of its boxes in ``rows`` [shards, width]; at most two pairs, one for each size."""
        base, larger = divmod(self.shape[self.dim], self.shards)
        for first, count, size in ((0, larger, base + 1), (larger, self.shards - larger, base)):
            if count == 0 or size == 0:
                continue
            start = self.bounds(first)[0]
            boxes = tensor.narrow(self.dim, start, count * size).unflatten(self.dim, (count, size)).movedim(self.dim, 0)
            yield boxes, rows[first : first + count, : boxes[0].numel()].unflatten(1, boxes.shape[1:])
