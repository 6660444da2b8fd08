"""Memory of a rank, by part, at the moment of a step when it needs most."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.sharding import Sharding
from megatron_m2.planning import activations
from megatron_m2.planning.job import Job, Layout, Stage, microbatches, stages
from megatron_m2.planning.tokens import Shares, shares
from megatron_m2.planning.weights import WeightGroup, stage_weights

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
    weights, gradients, optimizer = _states(groups, layout.sharding)
    mtp = sum(_states([g for g in groups if g.part == "mtp"], layout.sharding))
    kept, working = _activations(job, layout, stage, index, s)
    # when the step ends activations are gone, and what was reduced is there beside the sums
    reduced = 0 if layout.sharding.zero == 2 else sum(_FP32 * _shard(g, layout.sharding) for g in groups if g.replicas > 1)
    return Memory(weights, gradients, optimizer, kept, max(working, reduced - kept), _buffers(job, layout, s), mtp)


def _states(groups: list[WeightGroup], sharding: Sharding) -> tuple[int, int, int]:
    """Bytes of weights, gradient sums and optimizer state."""
    weights = sum(g.count * (_FP32 if g.wide else _BF16) for g in groups)
    gradients = optimizer = 0
    for g in groups:
        if g.trained:
            shard = _shard(g, sharding)
            gradients += _FP32 * (shard if sharding.zero == 2 and not g.across_stages else g.count)
            own_master = g.wide and sharding.shards(g.replicas, g.part) == 1
            optimizer += (2 if own_master else 3) * _FP32 * shard
    return weights, gradients, optimizer


def _shard(group: WeightGroup, sharding: Sharding) -> int:
    """Weights of the group whose optimizer state one rank has."""
    return -(-group.count // sharding.shards(group.replicas, group.part))


def in_flight(parallel: ParallelConfig, place: int, microbatches: int) -> list[int]:
    """Microbatches whose activations each chunk of a place in the pipeline keeps when all together are most.

    1F1B: as many as stages from it to the end. Interleaved: twice the distance to the end, and ``pp`` of every chunk but the last
    (arXiv:2104.04473). Zero bubble and its V form: as many as ``pp`` whole stages everywhere, since what waits for its weights'
    gradients is kept too (arXiv:2401.10241); the V's way back is short.
    """
    pp, vpp, n = parallel.pp, parallel.vpp, microbatches
    if pp == 1:
        return [1]
    if parallel.schedule == "1f1b":
        counts = [pp - place]
    elif parallel.schedule == "interleaved":
        ahead = 2 * (pp - 1 - place) + 1
        counts = [pp] * (vpp - 1) + [min(pp, ahead)]
        counts[0] += max(0, ahead - pp)
    elif parallel.schedule == "zero_bubble":
        counts = [pp] * vpp
    else:
        counts = [2 * pp - 1 - place, place + 1]
    return [min(count, n) for count in counts]


def _activations(job: Job, layout: Layout, stage: Stage, place: int, s: Shares) -> tuple[int, int]:
    """(kept, for a moment)."""
    hidden, recompute = job.model.hidden_size, layout.parallel.recompute
    whole = sum(activations.layer_kept(job, layout, s).values())
    layer = activations.layer_input(s, hidden) if recompute else whole
    counts = in_flight(layout.parallel, place, microbatches(job, layout))
    passed_on = activations.layer_input(s, hidden) if layout.parallel.pp > 1 else 0  # the output that the next stage gets
    kept = 0
    for chunk, (layers, count) in enumerate(zip(stage.layers, counts, strict=True)):
        each = layers * layer + activations.batch_kept(job, s)
        if stage.head and chunk == len(stage.layers) - 1:
            # the layer's input is among what a module keeps beside it where the layer is run again
            each += activations.head_kept(job, s) + stage.mtp * (activations.mtp_kept(job, layout, s) + (0 if recompute else whole))
        else:
            each += passed_on
        kept += count * each
    moments = [activations.layer_working(job, layout, s) + (whole - layer if recompute else 0)]
    if stage.head:
        if stage.mtp:  # the gradient of the head's weight waits for the main model's
            moments[0] += activations.Widths.of(job, layout).vocabulary * hidden * _BF16
        moments.append(activations.head_working(job, layout, s))
    return kept, max(moments)


def _buffers(job: Job, layout: Layout, s: Shares) -> int:
    """Messages between stages, two each way; under ZeRO-2 three buckets of gradients, or as many of the largest weight."""
    pipeline = 4 * s.rank * job.model.hidden_size * _BF16 if layout.parallel.pp > 1 else 0
    if layout.sharding.zero < 2:
        return pipeline
    largest = 2 * job.model.num_experts // layout.parallel.ep * job.model.intermediate_size * job.model.hidden_size
    return pipeline + 3 * max(layout.sharding.bucket_bytes, largest * _FP32)
