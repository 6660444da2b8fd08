"""What a rank sends to others: bytes by kind of collective, and how long a link takes over them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from megatron_m2.planning.activations import Widths
from megatron_m2.planning.cluster import ClusterConfig, Device
from megatron_m2.planning.job import Job, Layout, Stage, distinct_groups
from megatron_m2.planning.tokens import Shares
from megatron_m2.planning.weights import stage_weights

_BF16, _FP32, _INT32 = 2, 4, 4


class Traffic(NamedTuple):
    """One kind of collective on one rank.

    Attributes:
        kind: "tp", "cp", "ep", "dp" or "pp"; name: what travels.
        near, far: bytes sent within the node, and out of it.
        messages: collectives.
        far_links: network links that carry ``far`` together: the group's ranks in the node, where a ring uses each one's.
    """

    kind: str
    name: str
    near: float
    far: float
    messages: float = 1
    far_links: int = 1

    @property
    def bytes(self) -> float:
        return self.near + self.far

    def times(self, n: float) -> Traffic:
        return Traffic(self.kind, self.name, self.near * n, self.far * n, self.messages * n, self.far_links)

    def seconds(self, device: Device) -> float:
        """Both links at once, and the latency of every message."""
        latency = device.network_latency.value if self.far else device.nvlink_latency.value
        far = self.far / self.far_links / device.network.value
        return max((self.near + (self.far if self.far_links > 1 else 0)) / device.nvlink.value, far) + self.messages * latency


def joined(traffic: Iterable[Traffic]) -> list[Traffic]:
    """Sums of those of one name."""
    sums: dict[str, Traffic] = {}
    for t in traffic:
        old = sums.get(t.name)
        sums[t.name] = t if old is None else old._replace(near=old.near + t.near, far=old.far + t.far, messages=old.messages + t.messages)
    return list(sums.values())


def _ring(kind: str, name: str, sent: float, size: int, stride: int, cluster: ClusterConfig, messages: float = 1) -> Traffic:
    """A gather or reduce-scatter in which each rank sends ``sent`` bytes: where it spans nodes, one ring through every rank's link."""
    near = cluster.per_node(size, stride)
    if near == size:
        return Traffic(kind, name, sent, 0, messages)
    return Traffic(kind, name, 0, sent, messages, near)


def _exchange(kind: str, name: str, sent: float, size: int, stride: int, cluster: ClusterConfig, messages: float = 1) -> Traffic:
    """An all-to-all in which each rank sends ``sent`` bytes to the other ``size - 1``, evenly."""
    near = (cluster.per_node(size, stride) - 1) / (size - 1)
    return Traffic(kind, name, sent * near, sent * (1 - near), messages)


def layer_traffic(job: Job, layout: Layout, s: Shares, backward: bool) -> list[Traffic]:
    """Of one decoder layer and one forest; each backward is the transpose of its forward and moves as much."""
    p, w, cluster = layout.parallel, Widths.of(job, layout), job.cluster
    found = []
    if p.tp > 1:
        rows = (p.tp - 1) * s.rank * w.hidden * _BF16
        squares = 2 * 2 * s.cp * _FP32 * (p.tp - 1) / p.tp  # of q and of k, all-reduced
        found += [_ring("tp", "tp rows", 2 * rows, p.tp, 1, cluster, 2), _ring("tp", "tp squares", squares, p.tp, 1, cluster, 2)]
    if p.cp > 1:
        found.append(_exchange("cp", "cp keys, values", s.received * 2 * w.kv * _BF16, p.cp, p.tp, cluster))
    if p.ep > 1:
        found += _expert_traffic(job, layout, s, backward)
    return found


def _expert_traffic(job: Job, layout: Layout, s: Shares, backward: bool) -> list[Traffic]:
    """Rows to their experts and sums back; in the backward gradients the same two ways."""
    m, ep, cluster = job.model, layout.parallel.ep, job.cluster
    row, weights = m.hidden_size * _BF16, m.top_k * _FP32
    if backward:
        there, back, messages = row, row + weights, 2
    else:  # one message with state, weights and choices
        codes = m.hidden_size + -(-m.hidden_size // 128) * _FP32
        there, back, messages = (codes if job.options.dispatch_fp8 else row) + weights + m.top_k * _INT32, row, 1
    others = s.sent * (ep - 1) / ep
    if not job.options.node_dedup or cluster.per_node(ep, 1) == ep:
        return [_exchange("ep", "ep dispatch", others * there, ep, 1, cluster, 1 if backward else 2),  # forward: the counts too
                _exchange("ep", "ep combine", others * back, ep, 1, cluster, messages)]
    nodes = ep // cluster.per_node(ep, 1)
    far = s.rank * distinct_groups(m.num_experts, m.top_k, nodes) * (nodes - 1) / nodes
    inside = s.sent * (1 - nodes / ep)  # every row but those for the rank where it enters the node
    return [Traffic("ep", "ep dispatch", inside * there, far * there, 1 if backward else 2),
            Traffic("ep", "ep combine", inside * back, far * back, messages)]


def ends_traffic(job: Job, layout: Layout, stage: Stage, s: Shares) -> list[Traffic]:
    """Of embedding, head and MTP modules beside their layers, forward; the backward moves as much."""
    p = layout.parallel
    if p.tp == 1:
        return []
    rows = (p.tp - 1) * s.rank * job.model.hidden_size * _BF16
    logits = 1 + stage.mtp if stage.head else 0
    found = [_ring("tp", "tp rows", rows * (logits + stage.embedding), p.tp, 1, job.cluster, logits + stage.embedding)]
    if logits:
        found.append(_ring("tp", "tp logits", logits * (p.tp - 1) * s.cp * 2 * _FP32, p.tp, 1, job.cluster, logits))
    return found


def pipeline_traffic(job: Job, layout: Layout, s: Shares) -> list[Traffic]:
    """Between two stages, one forest, one way, all chunks of a stage."""
    pp = layout.parallel.pp
    if pp == 1:
        return []
    sent = layout.parallel.vpp * s.rank * job.model.hidden_size * _BF16
    stage_ranks = job.cluster.ranks // pp
    near = job.cluster.per_node(pp, stage_ranks) == pp
    return [Traffic("pp", "pp states", sent if near else 0, 0 if near else sent, layout.parallel.vpp)]


def replica_traffic(job: Job, layout: Layout, stage: Stage, microbatches: int) -> list[Traffic]:
    """Of one step: gradients (fp32) summed over each weight's replicas, weights gathered from their shards in their own dtype.

    ZeRO-0 reduces all of it everywhere; ZeRO-1 reduce-scatters over the shards, and sums these over their copies; ZeRO-2 reduce-scatters
    every microbatch's.
    """
    found = []
    sharding = layout.sharding
    for g in stage_weights(job, layout, stage):
        if g.replicas == 1 or not g.trained:
            continue
        kind = "expert" if g.part == "experts" or (g.part == "mtp" and g.stride == layout.parallel.ep > 1) else "dense"
        shards = sharding.shards(g.replicas, g.part)
        others, copies = (shards - 1) / shards * g.count, g.replicas // shards
        times = microbatches if sharding.zero == 2 and not g.across_stages else 1
        if shards > 1:
            width = _FP32 if g.wide else _BF16
            found += [_ring("dp", f"dp {kind} gradients", others * _FP32 * times, shards, g.stride, job.cluster, times),
                      _ring("dp", f"dp {kind} weights", others * width, shards, g.stride, job.cluster)]
        if copies > 1:
            size = 2 * (copies - 1) / copies * g.count / shards * _FP32
            found.append(_ring("dp", f"dp {kind} gradients", size, copies, g.stride * shards, job.cluster))
    return found
