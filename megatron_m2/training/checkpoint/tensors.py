"""Boxes of whole tensors in torch.distributed.checkpoint's files: planning what each rank writes, reading any part of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_m2.parallel.box import Box
from megatron_m2.training.checkpoint.ranks import Ranks

CHUNK_BYTES = 128 << 20  # a box is stored in pieces of at most so much: reading a part of it reads the pieces that it meets


@dataclass(frozen=True, eq=False)
class PerRank:
    """A tensor that each rank has for itself, of the same shape everywhere. Read by another number of ranks, rank r gets that of rank
    ``r mod`` the number that wrote."""

    local: Tensor


Flat = dict[str, Box | PerRank]


def flatten(state: Mapping[str, Any], prefix: str = "") -> Flat:
    """Nested dictionaries of tensors, boxes and :class:`PerRank` by dotted name; a tensor is the box that is the whole."""
    flat: Flat = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            flat[prefix + key] = Box(value.detach(), (0,) * value.dim(), tuple(value.shape))
        else:
            assert isinstance(value, Box | PerRank), f"{prefix}{key}: {type(value).__name__}"
            flat[prefix + key] = value
    return flat


# ---- writing ------------------------------------------------------------------------------------------------------------------------


class SavePlanner(dcp.DefaultSavePlanner):
    """Writes boxes, in pieces of at most ``chunk_bytes``. A piece that several ranks have is written by the one with least to write.

    Args:
        ranks: those that write together.
    """

    def __init__(self, ranks: Ranks, chunk_bytes: int) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._ranks, self._chunk_bytes = ranks, chunk_bytes

    def create_local_plan(self) -> SavePlan:
        self._boxes = {name: self._box(value) for name, value in self.state_dict.items()}
        self.plan = SavePlan([item for name, box in self._boxes.items() for item in self._items(name, box)])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return super().create_global_plan(_without_copies(all_plans))

    def _box(self, value: Box | PerRank) -> Box:
        if isinstance(value, Box):
            return value
        if self._ranks.size == 1:
            return Box(value.local, (0,) * value.local.dim(), tuple(value.local.shape))
        return Box(value.local[None], (self._ranks.rank, *(0,) * value.local.dim()), (self._ranks.size, *value.local.shape))

    def _items(self, name: str, box: Box) -> Iterator[WriteItem]:
        properties = TensorProperties.create_from_tensor(box.local)
        for offsets, sizes in _pieces(box, self._chunk_bytes):
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            yield WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD,
                            tensor_data=TensorWriteData(chunk, properties, torch.Size(box.whole)))

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None
        box, chunk = self._boxes[write_item.index.fqn], write_item.tensor_data.chunk
        return _narrow(box.local, [a - b for a, b in zip(chunk.offsets, box.offsets, strict=True)], chunk.sizes)


def _without_copies(plans: list[SavePlan]) -> list[SavePlan]:
    """DCP does this too, but counts a piece as its whole tensor, which leaves some ranks with several times the bytes of others."""
    owners: dict[MetadataIndex, list[int]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            owners.setdefault(item.index, []).append(rank)
    loads = [0] * len(plans)
    kept: list[list[WriteItem]] = [[] for _ in plans]
    items = {item.index: item for plan in plans for item in plan.items}
    for index, ranks in sorted(owners.items(), key=lambda entry: len(entry[1]) > 1):  # first those without a choice
        rank = min(ranks, key=lambda r: loads[r])
        kept[rank].append(items[index])
        loads[rank] += _file_bytes(items[index])
    return [replace(plan, items=mine) for plan, mine in zip(plans, kept, strict=True)]


def _file_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize + 1024  # about what torch.save adds


def _pieces(box: Box, chunk_bytes: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets in the whole and sizes of a box's pieces along its first dimension; none for an empty part of a tensor that is not empty."""
    shape = tuple(box.local.shape)
    if prod(shape) == 0 or len(shape) == 0:
        if prod(shape) == prod(box.whole):
            yield box.offsets, shape
        return
    rows = max(1, chunk_bytes // (box.local.nbytes // shape[0]))
    for start in range(0, shape[0], rows):
        yield (box.offsets[0] + start, *box.offsets[1:]), (min(rows, shape[0] - start), *shape[1:])


def _narrow(tensor: Tensor, offsets: list[int], sizes: tuple[int, ...]) -> Tensor:
    for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


# ---- reading ------------------------------------------------------------------------------------------------------------------------


class _Targets(dcp.DefaultLoadPlanner):
    """Where what is read goes."""

    def __init__(self, boxes: Mapping[str, Box]) -> None:
        super().__init__()
        self._boxes = boxes

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._boxes[index.fqn].local


class StateReader:
    """The tensors in a checkpoint's ``state`` folder, whatever layout of ranks wrote them.

    Args:
        cache_bytes: :meth:`part` keeps about so much of what it read.

    Raises:
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path, cache_bytes: int = 0) -> None:
        self._reader = dcp.FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {name: t for name, t in metadata.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}
        self._cache: OrderedDict[tuple[str, tuple[int, ...]], Tensor] = OrderedDict()
        self._cache_bytes = cache_bytes

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._find(name).properties.dtype
        return dtype

    def read_into(self, state: Flat, ranks: Ranks) -> None:
        """Reads every box, in place.

        Raises:
            KeyError, ValueError: a tensor is missing or has another shape; it is named.
        """
        self._read({name: self._target(name, value, ranks) for name, value in state.items()})

    def part(self, name: str, index: tuple[int | slice, ...]) -> Tensor:
        """``whole[index]`` on the CPU, of which only the pieces that it meets are read. ``index`` as of a view: integers and slices."""
        stored = self._find(name)
        dims = [range(n)[i] if isinstance(i, slice) else range(i, i + 1) for n, i in zip(stored.size, index, strict=False)]
        dims += [range(n) for n in stored.size[len(index) :]]
        whole = Box(torch.empty([len(d) for d in dims], dtype=stored.properties.dtype), tuple(d.start for d in dims), tuple(stored.size))
        for item in _items(name, stored, whole):
            assert item.storage_index.index is not None
            piece = _narrow(self._piece(name, stored.chunks[item.storage_index.index]), list(item.storage_offsets), item.lengths)
            _narrow(whole.local, list(item.dest_offsets), item.lengths).copy_(piece)
        return whole.local[tuple(slice(None) if isinstance(i, slice) else 0 for i in index)]

    def _piece(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        key = name, tuple(chunk.offsets)
        if key not in self._cache:
            stored = self._find(name)
            box = Box(torch.empty(chunk.sizes, dtype=stored.properties.dtype), tuple(chunk.offsets), tuple(stored.size))
            kept = sum(t.nbytes for t in self._cache.values())
            while self._cache and kept + box.local.nbytes > self._cache_bytes:
                kept -= self._cache.popitem(last=False)[1].nbytes
            self._read({name: box})
            self._cache[key] = box.local
        self._cache.move_to_end(key)
        return self._cache[key]

    def _read(self, boxes: Mapping[str, Box]) -> None:
        items = [item for name, box in boxes.items() for item in _items(name, self._find(name), box)]
        self._reader.read_data(LoadPlan(items), _Targets(boxes)).wait()

    def _target(self, name: str, value: Box | PerRank, ranks: Ranks) -> Box:
        stored = tuple(self._find(name).size)
        if isinstance(value, Box):
            if value.whole != stored:
                raise ValueError(f"{name} is {list(stored)} there, {list(value.whole)} here")
            return value
        if stored == tuple(value.local.shape):  # of one rank
            return Box(value.local, (0,) * value.local.dim(), stored)
        if stored[1:] != tuple(value.local.shape):
            raise ValueError(f"{name} is {list(stored[1:])} there, {list(value.local.shape)} here")
        return Box(value.local[None], (ranks.rank % stored[0], *(0,) * value.local.dim()), stored)

    def _find(self, name: str) -> TensorStorageMetadata:
        if name not in self._tensors:
            raise KeyError(f"no tensor {name} there")
        return self._tensors[name]


def _items(name: str, stored: TensorStorageMetadata, box: Box) -> list[ReadItem]:
    """What to read for a box."""
    chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.local.shape))
    items = create_read_items_for_chunk_list(name, stored, [chunk]) if box.local.numel() else []
    found = sum(prod(item.lengths) for item in items)
    if found != box.local.numel():
        raise ValueError(f"{name}: {found} elements there of the {box.local.numel()} from {list(box.offsets)} on")
    return items
