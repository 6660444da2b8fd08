"""Runs a model for its shapes alone: weights and activations on the meta device, integers on the CPU, collectives on fake groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_m2.ops import _extension

Traffic = Counter[tuple[str, str]]  # (axis, collective) -> calls or bytes

_NAMES = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter",
          "alltoall_base_": "all-to-all"}


class ShapeRun(TorchDispatchMode):
    """Operations on meta tensors give meta tensors, whatever else goes in; routes are drawn, all experts alike; collectives are counted.

    Args:
        axes: name of the mesh's axis by name of its process group.

    Attributes:
        calls, bytes: of collectives, by axis and kind; bytes of this rank's input (of what it gets, for a gather).

    Raises:
        ValueError: the extension is not built: only with it do the ops have shapes of their own.
    """

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__()
        if not _extension.available("meta"):
            raise ValueError("megatron_m2._C is not built: a run for shapes needs the shapes of its ops")
        self.axes, self.calls, self.bytes = axes, Traffic(), Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        if func.namespace == "c10d":
            self._count(name, args)
            if name == "alltoall_base_" and not args[0].is_meta:
                # who gets how many rows: others' routes are as even as ours
                args[0].copy_(args[1])
        elif any(t.is_meta for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
            args, kwargs = tree_map_only(Tensor, lambda t: t if t.is_meta else t.to("meta"), (args, kwargs))
        result = func(*args, **kwargs)
        if name == "router_topk":
            weights, experts, counts = result
            return weights, drawn_routes(len(experts), experts.shape[1], len(counts)), counts
        return result

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
        key = self.axes[group.group_name], _NAMES[name]
        tensors = [t for t in tree_leaves(args[0] if name != "_reduce_scatter_base_" else args[1]) if isinstance(t, Tensor)]
        self.calls[key] += 1
        self.bytes[key] += sum(t.numel() * t.itemsize for t in tensors)


def drawn_routes(tokens: int, top_k: int, experts: int) -> Tensor:
    """int32 [T, K]: distinct experts for each token, all equally likely; the same every time."""
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)).topk(top_k).indices.int()


@contextmanager
def saved_bytes(ignore: Callable[[Tensor], bool]) -> Iterator[list[int]]:
    """Bytes of distinct storages that autograd saves in this block, as a list of one number; for each storage asks ``ignore`` once."""
    total, seen = [0], set[int]()

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(t)  # so that no later storage gets its address
            total[0] += 0 if ignore(t) else storage.nbytes()
        return t

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield total
