"""The weights a rank holds, exactly, and how many ranks hold the same ones."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_m2.parallel.layout import part
from megatron_m2.planning.job import Job, Layout, Stage


@dataclass(frozen=True)
class WeightGroup:
    """Weights of one kind on one rank.

    Attributes:
        part: "embedding", "attention", "norms", "router", "experts", "mtp", "head".
        count: how many.
        replicas: ranks that hold the same ones; they add up their gradients and may share out the optimizer's state.
        stride: distance between such ranks.
        wide: fp32 (the router); else bf16.
        across_stages: its replicas lie on two pipeline stages, so that ZeRO-2 leaves its gradients whole (an embedding of MTP modules too).
        trained: has a gradient (all but the router's bias).
    """

    part: str
    count: int
    replicas: int
    stride: int
    wide: bool = False
    trained: bool = True
    across_stages: bool = False


@dataclass(frozen=True)
class Replicas:
    """(number, stride) of the ranks that share a weight, by how it is split: ``Placement.replicas``'s names."""

    stage: tuple[int, int]
    heads: tuple[int, int]
    embedding: tuple[int, int]
    kv: tuple[int, int]
    experts: tuple[int, int]

    @classmethod
    def of(cls, job: Job, layout: Layout) -> Replicas:
        p = layout.parallel
        both = p.dp(job.cluster.ranks) * p.cp
        copies = max(1, p.tp // job.model.num_key_value_heads)
        twice = 2 if job.model.num_mtp_modules and not p.first_stage_with_last else 1  # on the first stage and on the last
        return cls((both * p.tp, 1), (both, p.tp), (both * twice, p.tp), (both * copies, p.tp // copies), (both * p.tp // p.ep, p.ep))


def layer_weights(job: Job, layout: Layout, rank: int = 0) -> list[WeightGroup]:
    """Of one decoder layer on the tp rank ``rank``."""
    m, p, r = job.model, layout.parallel, Replicas.of(job, layout)
    copies = max(1, p.tp // m.num_key_value_heads)
    q = _length(m.q_size, p.tp, rank)
    kv = _length(m.kv_size, p.tp // copies, rank // copies)
    return [WeightGroup("attention", q * (2 * m.hidden_size + 1), *r.heads),
            WeightGroup("attention", kv * (2 * m.hidden_size + 1), *r.kv),
            WeightGroup("norms", 2 * m.hidden_size, *r.stage),
            WeightGroup("router", m.num_experts * m.hidden_size, *r.stage, wide=True),
            WeightGroup("router", m.num_experts, *r.stage, wide=True, trained=False),
            WeightGroup("experts", m.num_experts // p.ep * m.expert_parameters, *r.experts)]


def stage_weights(job: Job, layout: Layout, stage: Stage, rank: int = 0) -> list[WeightGroup]:
    """All of a stage's, on the tp rank ``rank``; groups of the same kind are joined."""
    m, r = job.model, Replicas.of(job, layout)
    vocabulary = _length(m.vocab_size, layout.parallel.tp, rank) * m.hidden_size
    layer = layer_weights(job, layout, rank)
    groups = [WeightGroup(g.part, g.count * stage.total_layers, g.replicas, g.stride, g.wide, g.trained) for g in layer]
    if stage.embedding:
        groups.append(WeightGroup("embedding", vocabulary, *r.embedding, across_stages=m.num_mtp_modules > 0))
    if stage.head:
        groups += [WeightGroup("norms", m.hidden_size, *r.stage), WeightGroup("head", vocabulary, *r.heads)]
    if stage.mtp:
        groups += [WeightGroup("mtp", g.count * stage.mtp, g.replicas, g.stride, g.wide, g.trained) for g in layer]
        groups.append(WeightGroup("mtp", (2 * m.hidden_size**2 + 3 * m.hidden_size) * stage.mtp, *r.stage))
    return [g for g in groups if g.count]


def _length(size: int, parts: int, index: int) -> int:
    start, stop = part(size, parts, index)
    return stop - start
