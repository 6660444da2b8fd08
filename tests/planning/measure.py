"""What a real model keeps, takes and sends, measured where it happens: in autograd, in torch's allocator, in the collectives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_m2.forest import TokenForest
from megatron_m2.model.m2 import M2Model
from megatron_m2.parallel import collectives
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import Axis, Mesh
from megatron_m2.planning.cluster import ClusterConfig
from megatron_m2.planning.job import Job, Layout
from megatron_m2.training.config import OptimConfig
from megatron_m2.training.losses import LossWeights, forest_loss
from megatron_m2.training.optimizer import MasterAdamW


def job_of(model, ranks: int, seq_len: int, batch_tokens: int, **options) -> Job:
    """On a machine of CPU ranks, one node."""
    from megatron_m2.planning.job import Options

    return Job(model, ClusterConfig(1, ranks, "cpu", "cpu"), seq_len, batch_tokens, Options(**options))


def mesh_of(parallel: ParallelConfig, world: int, rank: int, kv_heads: int) -> Mesh:
    """One rank's mesh without process groups: sizes and places alone, from the order of ranks that the layout prescribes."""
    pp, cp, tp, ep, dp = parallel.pp, parallel.cp, parallel.tp, parallel.ep, parallel.dp(world)
    stage, place = dp * cp * tp, rank % (dp * cp * tp)
    copies = max(1, tp // kv_heads)
    return Mesh(pp=Axis(pp, rank // stage), dp=Axis(dp, place // (cp * tp)), cp=Axis(cp, place // tp % cp), tp=Axis(tp, place % tp),
                sequence=Axis(cp * tp, place % (cp * tp)), stage=Axis(stage, place), heads=Axis(dp * cp, place // tp),
                kv=Axis(dp * cp * copies, place // tp * copies + place % copies), ep=Axis(ep, place % ep),
                experts=Axis(stage // ep, place // ep), world=Axis(world, rank))


def chains(layout: Layout, seq_len: int, vocab: int) -> TokenForest:
    generator = torch.Generator().manual_seed(0)
    count = layout.tokens_per_forest // seq_len
    return TokenForest.from_documents(torch.randint(0, vocab, (count, seq_len), generator=generator).numpy())


def kept_bytes(model: M2Model, forest: TokenForest) -> dict[str, int]:
    """Bytes of the distinct storages that one forward saves for the backward, weights apart, by the module that was running: "layers",
    "mtp", or "rest"."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, torch.Tensor] = {}  # holds what was saved, so that no address is used twice
    sums: dict[str, int] = defaultdict(int)
    running = ["rest"]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = tensor
            sums[running[0]] += storage.nbytes()
        return tensor

    hooks = []
    for name in ("layers", "mtp"):
        for module in getattr(model, name):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.__setitem__(0, name)))
            hooks.append(module.register_forward_hook(lambda *_: running.__setitem__(0, "rest")))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(forest)
    for hook in hooks:
        hook.remove()
    del output
    return dict(sums)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch's allocator held during ``work`` beyond what it held before, temporaries of kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = sorted((e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    assert events, "the profiler saw no allocation"
    held = most = 0
    for _, size in events:
        held += size
        most = max(most, held)
    return most


class Trained:
    """A model with its optimizer after one step, so that everything a step needs between steps exists."""

    def __init__(self, model: M2Model, forest: TokenForest) -> None:
        self.model, self.forest = model, forest
        self.weights = LossWeights.of([forest, forest], model.config.num_mtp_modules)
        self.optimizer = MasterAdamW(model.named_parameters(), OptimConfig())
        self.step()

    def microbatch(self) -> None:
        output = self.model(self.forest)
        forest_loss(output, self.forest, self.weights, 0.3, 2).total.backward()

    def step(self) -> None:
        """Two microbatches: in the second one the gradients' sums are there."""
        self.microbatch()
        self.microbatch()
        self.optimizer.step(1e-3)

    def standing_bytes(self) -> tuple[int, int]:
        """Of the weights, and of masters and moments."""
        weights = sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers()))
        own = {id(p) for p in self.model.parameters()}
        state = 0
        for master in self.optimizer.masters.values():
            moments = self.optimizer.adamw.state[master]
            tensors = [moments["exp_avg"], moments["exp_avg_sq"], *([] if id(master) in own else [master])]
            state += sum(t.numel() * t.element_size() for t in tensors)
        return weights, state


@contextmanager
def sent_bytes(axes: dict[str, Axis]) -> Iterator[dict[str, int]]:
    """Bytes that this rank sends to others in each axis' group while the context is open."""
    sums: dict[str, int] = defaultdict(int)
    names = {id(axis.group): name for name, axis in axes.items() if axis.group is not None}
    originals = dist.all_reduce, dist.all_to_all_single, collectives._all_gather, collectives._reduce_scatter

    def count(group: object, size: float) -> None:
        sums[names[id(group)]] += round(size)

    def all_reduce(tensor: torch.Tensor, *rest, group, **named):
        ranks = dist.get_world_size(group)
        count(group, 2 * (ranks - 1) / ranks * tensor.nbytes)
        return originals[0](tensor, *rest, group=group, **named)

    def all_to_all(out, tensor, out_splits=None, splits=None, group=None, **named):
        ranks, me = dist.get_world_size(group), dist.get_rank(group)
        splits_here = splits or [len(tensor) // ranks] * ranks
        row = tensor.nbytes // max(1, len(tensor))
        count(group, row * (sum(splits_here) - splits_here[me]))
        return originals[1](out, tensor, out_splits, splits, group=group, **named)

    def all_gather(out, tensor, group):
        count(group, (dist.get_world_size(group) - 1) * tensor.nbytes)
        return originals[2](out, tensor, group=group)

    def reduce_scatter(out, tensor, group):
        count(group, (dist.get_world_size(group) - 1) * out.nbytes)
        return originals[3](out, tensor, group=group)

    dist.all_reduce, dist.all_to_all_single = all_reduce, all_to_all
    collectives._all_gather, collectives._reduce_scatter = all_gather, reduce_scatter
    try:
        yield sums
    finally:
        dist.all_reduce, dist.all_to_all_single, collectives._all_gather, collectives._reduce_scatter = originals
