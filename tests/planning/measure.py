"""What a real model keeps, takes and sends, measured where it happens: in autograd, in torch's allocator, in the collectives."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_m2.forest import TokenForest
from megatron_m2.model.m2 import M2Model
from megatron_m2.parallel.collectives import highest
from megatron_m2.parallel.mesh import ONE, Axis, Mesh
from megatron_m2.planning.cluster import ClusterConfig
from megatron_m2.planning.job import Job, Layout, Options
from megatron_m2.training.config import OptimConfig
from megatron_m2.training.losses import ForestObjective, LossWeights
from megatron_m2.training.optimizer import MasterAdamW
from megatron_m2.training.stages import ModelStages


def job_of(model, ranks: int, seq_len: int, batch_tokens: int, **options) -> Job:
    """On a machine of CPU ranks, one node."""
    return Job(model, ClusterConfig(1, ranks, "cpu", "cpu"), seq_len, batch_tokens, Options(**options))


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


class Trained:
    """This rank's stages with their optimizer, after one step, so that everything a step needs between steps exists.

    Args:
        microbatches: of a step; at least two: in the second one the gradients' sums are there.
    """

    def __init__(self, job: Job, layout: Layout, mesh: Mesh = ONE, microbatches: int = 2) -> None:
        self.stages = ModelStages(job.model, layout.parallel, mesh, torch.bfloat16, "cpu", 0, job.seq_len // 2)
        self.forests = [chains(layout, job.seq_len, job.model.vocab_size)] * microbatches
        self.objective = ForestObjective(self.forests, LossWeights.of(self.forests, job.model.num_mtp_modules), 0.3, microbatches)
        self.optimizer = MasterAdamW(self.stages.named_parameters(), OptimConfig(), mesh, layout.sharding)
        self.step()

    def step(self) -> None:
        self.stages.train(self.forests, self.objective, self.optimizer.before_backward)
        self.optimizer.step(0.0)  # routes stay as they are

    def accumulate(self) -> None:
        """The step's forwards and backwards, nothing reduced: gloo copies what it reduces, NCCL does not."""
        self.stages.train(self.forests, self.objective)

    @property
    def model(self) -> M2Model:
        """The only stage."""
        (model,) = self.stages.stages.values()
        return model

    def fullest(self, value: int) -> int:
        """The largest of this stage's ranks'."""
        axis = self.stages.mesh.stage
        return value if axis.size == 1 else int(highest(torch.tensor(value), axis))

    def standing_bytes(self) -> tuple[int, int, int]:
        """Of the weights; of the gradients' sums that stay from step to step; of masters and moments."""
        weights = {t.untyped_storage().data_ptr(): t.nbytes for m in self.stages.stages.values() for t in m.state_dict().values()}
        masters = {m.untyped_storage().data_ptr(): m.untyped_storage().nbytes() for m in self.optimizer.masters.values()}
        moments = [self.optimizer.adamw.moments(m) for m in self.optimizer.masters.values()]
        state = sum(size for at, size in masters.items() if at not in weights) + sum(t.nbytes for m in moments for t in m.values())
        sums = sum(0 if b._sums_SW is None else b._sums_SW.nbytes for b in self.optimizer.gradients.buckets)
        return sum(weights.values()), sums, state


class SentBytes(TorchDispatchMode):
    """Bytes that this rank sends to others while the mode is on, by axis.

    Args:
        axes: by name; a group that is two of them counts as the last. Groups of none of them are the optimizer's: "dp".

    Attributes:
        sums: by name.
    """

    def __init__(self, axes: dict[str, Axis]) -> None:
        super().__init__()
        self.names = {axis.group.group_name: name for name, axis in axes.items() if axis.group is not None}
        self.sums: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[-1]
            group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            self.sums[self.names.get(group.group_name, "dp")] += round(self._sent(name, args, group.size(), group.rank()))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _sent(name: str, args, ranks: int, me: int) -> float:
        if name == "allreduce_":  # as a reduce-scatter and a gather
            return 2 * (ranks - 1) / ranks * sum(t.nbytes for t in args[0])
        if name in ("send", "recv_"):  # between stages
            return sum(t.nbytes for t in args[0]) if name == "send" else 0.0
        tensor = args[1]
        if name == "_allgather_base_":
            return (ranks - 1) * tensor.nbytes
        if name == "_reduce_scatter_base_":
            return (ranks - 1) / ranks * tensor.nbytes
        assert name == "alltoall_base_", name
        splits = list(args[4]) or [len(tensor) // ranks] * ranks
        return tensor.nbytes // max(1, len(tensor)) * (sum(splits) - splits[me])
