"""Memory of a rank, by part, at the moment of a step when it needs most."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_m2.planning import activations
from megatron_m2.planning.job import Job, Layout, Stage, microbatches, stages
from megatron_m2.planning.tokens import Shares, shares
from megatron_m2.planning.weights import WeightGroup, layer_weights, stage_weights

_BF16, _FP32 = 2, 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weights: what the model computes with; MTP modules included, see ``mtp``.
        gradients: their fp32 sums. optimizer: fp32 master copies and both moments.
        activations: kept for the backward, of all microbatches in flight. working: for a moment in the backward.
        buffers: of the pipeline's and ZeRO-2's messages.
        mtp: of weights, gradients and optimizer, the share of MTP modules; it is part of them and not added.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    buffers: int
    mtp: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "mtp")


def stage_memory(job: Job, layout: Layout, index: int) -> Memory:
    """Of the fullest rank of one pipeline stage."""
    return _memory(job, layout, stages(job, layout)[index], index, shares(job, layout))


def peak_memory(job: Job, layout: Layout) -> tuple[int, Memory]:
    """The stage that needs most, and what."""
    s = shares(job, layout)
    first: dict[Stage, int] = {}  # of equal stages the first has most microbatches in flight
    for index, stage in enumerate(stages(job, layout)):
        first.setdefault(stage, index)
    each = {index: _memory(job, layout, stage, index, s) for stage, index in first.items()}
    index = max(each, key=lambda i: each[i].total)
    return index, each[index]


def _memory(job: Job, layout: Layout, stage: Stage, index: int, s: Shares) -> Memory:
    groups = stage_weights(job, layout, stage)
    weights, gradients, optimizer = _states(groups, layout.zero)
    mtp = sum(_states([g for g in groups if g.part == "mtp"], layout.zero))
    kept, working = _activations(job, layout, stage, index, s)
    return Memory(weights, gradients, optimizer, kept, working, _buffers(job, layout, s), mtp)


def _states(groups: list[WeightGroup], zero: int) -> tuple[int, int, int]:
    """Bytes of weights, gradient sums and optimizer state."""
    weights = sum(g.count * (_FP32 if g.wide else _BF16) for g in groups)
    trained = [g for g in groups if g.trained]
    gradients = sum(_FP32 * _shard(g, zero >= 2) for g in trained)
    optimizer = sum((2 if g.wide else 3) * _FP32 * _shard(g, zero >= 1) for g in trained)
    return weights, gradients, optimizer


def _shard(group: WeightGroup, sharded: bool) -> int:
    return -(-group.count // group.replicas) if sharded else group.count


def in_flight(job: Job, layout: Layout, index: int) -> float:
    """Microbatches whose activations a stage keeps at once, in units of its whole layers.

    1F1B: a stage starts as many as there are stages from it to the end (Narayanan et al., arXiv:2104.04473). Interleaved, the same
    paper: twice the distance to the last stage, and one more per chunk and stage. Zero bubble (H1 of arXiv:2401.10241): what waits
    for its weight gradients is kept too, as many as stages on every stage.
    """
    pp, vpp, n = layout.parallel.pp, layout.vpp, microbatches(job, layout)
    if layout.schedule == "zero_bubble":
        return min(pp, n)
    if vpp == 1:
        return min(pp - index, n)
    chunks = 2 * (pp - index - 1) + (vpp - 1) * pp + 1
    return min(chunks, n * vpp) / vpp


def _activations(job: Job, layout: Layout, stage: Stage, index: int, s: Shares) -> tuple[int, int]:
    """(kept, for a moment)."""
    hidden = job.model.hidden_size
    whole = sum(activations.layer_kept(job, layout, s).values())
    layer = activations.layer_input(s, hidden) if layout.recompute else whole
    per_microbatch = stage.total_layers * layer + activations.batch_kept(job, s)
    if stage.head:
        per_microbatch += activations.head_kept(job, s)
        # the layer's input is among what a module keeps beside it where the layer is run again
        per_microbatch += stage.mtp * (activations.mtp_kept(job, layout, s) + (0 if layout.recompute else whole))
    moments = [activations.layer_working(job, layout, s) + (whole - layer if layout.recompute else 0)]
    if stage.head:
        head = activations.head_working(job, layout, s)
        if stage.mtp:  # the gradient of the head's weight waits for the main model's
            moments[0] += activations.Widths.of(job, layout).vocabulary * hidden * _BF16
        moments.append(head)
    return round(in_flight(job, layout, index) * per_microbatch), max(moments)


def _buffers(job: Job, layout: Layout, s: Shares) -> int:
    """Messages between stages, two each way; under ZeRO-2 one layer's gradients before they are shared out."""
    pipeline = 4 * s.rank * job.model.hidden_size * _BF16 if layout.parallel.pp > 1 else 0
    layer = sum(_FP32 * g.count for g in layer_weights(job, layout) if g.trained) if layout.zero >= 2 else 0
    return pipeline + layer
