"""Every distinct rank of a layout, built and run once for its shapes: what it holds, what autograd keeps, what it says to the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# torch's own stand-in for a process group of any size: collectives return at once and leave their outputs as they are
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_m2.forest import TokenForest
from megatron_m2.model.m2 import StageOutput
from megatron_m2.parallel.context import TokenShards
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import Axis, Mesh, build_mesh
from megatron_m2.parallel.pipeline import Action, Span, schedule
from megatron_m2.parallel.placement import placement_of
from megatron_m2.planning.shapes import ShapeRun, Traffic, saved_bytes
from megatron_m2.training.config import DTYPES, TrainConfig
from megatron_m2.training.losses import LossWeights, stage_loss
from megatron_m2.training.stages import ModelStages


@dataclass(frozen=True)
class RankReport:
    """One rank, for all that are built alike.

    Attributes:
        rank: its global number. pp: its place in the pipeline. alike: how many ranks have the same shapes.
        spans: layers of its stages.
        parameters: of weights that it holds a part of, this part's numbers by name, router biases included.
        wholes: numbers of the whole weights, by name.
        optimizer_bytes: master weights and two moments, of which each replica has its share.
        saved: bytes that autograd keeps of one forest, by stage (with recomputation: the layers' inputs).
        transient: bytes of one layer while it is run again; 0 without recomputation.
        held: most bytes kept at one time over a step's forests, in the schedule's order.
        calls, bytes: collectives of one forest's forward and backward, by axis and kind; bytes of what this rank puts in.
        handed_on: bytes that pass to and from its neighbours in the pipeline, per forest.
        step_bytes: once a step, by axis: gradients summed over replicas (fp32), updated weights gathered.
    """

    rank: int
    pp: int
    alike: int
    spans: dict[int, Span]
    parameters: dict[str, int]
    wholes: dict[str, int]
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved: dict[int, int]
    transient: int
    held: int
    calls: Traffic
    bytes: Traffic
    handed_on: int
    step_bytes: Traffic


@contextmanager
def fake_mesh(config: ParallelConfig, world: int, rank: int, kv_heads: int) -> Iterator[Mesh]:
    """The mesh that ``rank`` of ``world`` would have; nobody else is there."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield build_mesh(config, "cpu", kv_heads)
    finally:
        dist.destroy_process_group()


def dry_run(config: TrainConfig, world: int) -> Iterator[RankReport]:
    """A report for every kind of rank: one for each place in the pipeline, and for each other part of a vocabulary that tp leaves uneven.

    Raises:
        ValueError: the layout cannot be, or the extension is not built.
    """
    config.check_layout(world)
    parallel = config.parallel
    stage = world // parallel.pp
    tp_kinds = {0: parallel.tp} if config.model.vocab_size % parallel.tp == 0 else dict.fromkeys(range(parallel.tp), 1)
    for pp in range(parallel.pp):
        for tp, count in tp_kinds.items():
            yield _run_rank(config, world, pp * stage + tp, stage // parallel.tp * count)


def _run_rank(config: TrainConfig, world: int, rank: int, alike: int) -> RankReport:
    parallel = config.parallel
    with fake_mesh(parallel, world, rank, config.model.num_key_value_heads) as mesh:
        axes = _axis_names(mesh)
        run = ShapeRun(axes)
        stages = _stages(config, parallel, mesh)
        saved = _run_stages(stages, config, run)
        # what one layer keeps when it is run again is what it keeps without recomputation
        transient = 0
        if parallel.recompute:
            full = _run_stages(_stages(config, replace(parallel, recompute=False), mesh), config, ShapeRun(axes))
            transient = max((full[s] - saved[s]) // max(1, n.stop - n.start) for s, n in _spans(stages).items())
        rows = _hidden_rows(config, mesh)
        microbatches = config.stage.forests_per_step // mesh.dp.size
        order = schedule(parallel.schedule, parallel.pp, parallel.vpp, microbatches)[mesh.pp.rank]
        parameters = dict(stages.named_parameters())
        item = DTYPES[config.run.dtype].itemsize
        transfers = sum(a.kind.startswith(("SEND", "RECV")) for a in order)
        return RankReport(
            rank, mesh.pp.rank, alike, _spans(stages), {n: v.numel() for n, v in stages.state_dict().items()},
            {n: _whole(v, parameters.get(n)) for n, v in stages.state_dict().items()},
            sum(v.numel() * v.itemsize for v in stages.state_dict().values()), sum(4 * p.numel() for p in parameters.values()),
            sum(12 * -(-p.numel() // placement_of(p).axis(mesh).size) for p in parameters.values()),
            saved, transient, _most_held(order, saved), run.calls, run.bytes,
            transfers * rows * config.model.hidden_size * item // microbatches, _step_bytes(parameters.values(), mesh))


def _stages(config: TrainConfig, parallel: ParallelConfig, mesh: Mesh) -> ModelStages:
    return ModelStages(config.model, parallel, mesh, DTYPES[config.run.dtype], "meta", None, config.data.seq_len // 2)


def _spans(stages: ModelStages) -> dict[int, Span]:
    return {number: model.span for number, model in stages.stages.items()}


def _axis_names(mesh: Mesh) -> dict[str, str]:
    """By process group. Of axes with the same ranks, the one that is named first."""
    names: dict[str, str] = {}
    for f in fields(mesh):
        axis: Axis = getattr(mesh, f.name)
        if axis.group is not None:
            names.setdefault(axis.group.group_name, f.name)
    return names


def _forest(config: TrainConfig) -> TokenForest:
    full, rest = divmod(config.data.tokens_per_forest, config.data.seq_len)
    return TokenForest.from_documents([np.zeros(n, np.int64) for n in [config.data.seq_len] * full + [rest] * (rest > 0)])


def _hidden_rows(config: TrainConfig, mesh: Mesh) -> int:
    return len(TokenShards.split(_forest(config).depth, mesh).index_R)


def _run_stages(stages: ModelStages, config: TrainConfig, run: ShapeRun) -> dict[int, int]:
    """Forward and backward of one forest through each stage by itself; bytes that autograd keeps between them."""
    forest, saved = _forest(config), {}
    weights = LossWeights.of([forest], config.model.num_mtp_modules)

    def objective(microbatch: int, output: StageOutput) -> torch.Tensor:
        return stage_loss(output, forest, weights, config.stage.mtp_weight, 1).total

    rows = _hidden_rows(config, stages.mesh)
    for number, model in stages.stages.items():
        own = {p.untyped_storage()._cdata for p in model.state_dict(keep_vars=True).values()}

        def is_weight(t: Tensor, own: set[int] = own) -> bool:
            return t.untyped_storage()._cdata in own

        x = None if model.span.first else torch.empty(rows, config.model.hidden_size, dtype=model.dtype, device="meta", requires_grad=True)
        with run, saved_bytes(is_weight) as kept:
            part = stages.part(number, 0, forest, x, objective)[0]
            grads = [torch.empty_like(t) for t in part.outputs()]
        saved[number] = kept[0]
        with run:
            torch.autograd.backward(part.outputs(), grads)
    return saved


def _most_held(order: tuple[Action, ...], saved: dict[int, int]) -> int:
    """Activations live from their forward to the end of their backward."""
    ends = "W" if any(a.kind == "W" for a in order) else "B"
    now = most = 0
    for action in order:
        now += {"F": 1, ends: -1}.get(action.kind, 0) * saved.get(action.stage, 0)
        most = max(most, now)
    return most


def _step_bytes(parameters: Iterable[torch.nn.Parameter], mesh: Mesh) -> Traffic:
    found = Traffic()
    for p in parameters:
        placement = placement_of(p)
        if placement.axis(mesh).size > 1:
            found[placement.replicas, "reduce-scatter"] += 4 * p.numel()
            found[placement.replicas, "all-gather"] += p.numel() * p.itemsize
    return found


def _whole(value: Tensor, parameter: Tensor | None) -> int:
    shape = tuple(value.shape)
    return int(np.prod(placement_of(parameter).whole_shape(shape) if parameter is not None else shape, dtype=np.int64))
