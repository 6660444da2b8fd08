"""How long an optimizer step takes: products, attention, element-wise work, traffic that nothing hides, the pipeline's idle time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.pipeline import SPLIT_BACKWARD
from megatron_m2.planning.activations import Widths
from megatron_m2.planning.cluster import Device
from megatron_m2.planning.job import Job, Layout, Stage, chain_flops, forests_per_step, microbatches, stages
from megatron_m2.planning.tokens import Shares, shares
from megatron_m2.planning.traffic import (
    Traffic,
    ends_traffic,
    joined,
    layer_traffic,
    pipeline_traffic,
    replica_traffic,
)
from megatron_m2.planning.weights import stage_weights

Seconds = dict[str, float]


@dataclass(frozen=True)
class StepTime:
    """Of one optimizer step.

    Attributes:
        seconds: by part, of the slowest stage; "idle" is the pipeline's bubble. They add up to ``total``.
        flops: model FLOPs of the whole step, recomputation not counted.
        tokens: of the step. ranks: of the run. peak: FLOP/s of one device.
        traffic: of the busiest rank of the slowest stage, a whole step's.
    """

    seconds: Seconds
    flops: int
    tokens: int
    ranks: int
    peak: float
    traffic: list[Traffic]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.total

    @property
    def mfu(self) -> float:
        return self.flops / (self.total * self.ranks * self.peak)


def step_time(job: Job, layout: Layout, device: Device) -> StepTime:
    s, n = shares(job, layout), microbatches(job, layout)
    every = stages(job, layout)
    passes = {stage: _microbatch(job, layout, stage, s, device) for stage in set(every)}
    stage = max(every, key=lambda each: _total(passes[each]))
    seconds = {name: n * value for name, value in passes[stage].items()}
    others = sum(_total(passes[each]) for each in every) - _total(passes[stage])
    seconds["idle"] = _bubble(layout.parallel, n, others, _weight_gradients(job, layout, stage, s, device))
    replicas = replica_traffic(job, layout, stage, n)
    exchange = sum(t.seconds(device) for t in replicas)
    last_backward = 2 / 3 * sum(v for name, v in passes[stage].items() if name in ("products", "experts", "attention", "elementwise"))
    seconds["dp"] = exchange - min(job.options.hide_dp * exchange, last_backward)
    seconds["optimizer"] = _optimizer(job, layout, stage, device)
    forests = forests_per_step(job, layout)
    chains = layout.tokens_per_forest // job.seq_len
    traffic = joined([*(t.times(n) for t in _microbatch_traffic(job, layout, stage, s)), *replicas])
    return StepTime(seconds, 3 * chain_flops(job.model, job.seq_len) * chains * forests, forests * layout.tokens_per_forest,
                    job.cluster.ranks, device.peak.value, traffic)


# ---- one microbatch ------------------------------------------------------------------------------------------------------------


def _microbatch(job: Job, layout: Layout, stage: Stage, s: Shares, device: Device) -> Seconds:
    """Forward and backward of one forest on one stage, by part; with recomputation the forward twice."""
    layers, forwards = stage.total_layers + stage.mtp, 2 if layout.parallel.recompute else 1
    seconds: Seconds = {}
    for times, work in ((forwards * layers, _layer(job, layout, s, device, backward=False)),
                        (layers, _layer(job, layout, s, device, backward=True)), (1, _ends(job, layout, stage, s, device))):
        for name, value in work.items():
            seconds[name] = seconds.get(name, 0.0) + times * value
    for t in _microbatch_traffic(job, layout, stage, s):
        seconds[t.kind] = seconds.get(t.kind, 0.0) + (1 - getattr(job.options, f"hide_{t.kind}")) * t.seconds(device)
    return seconds


def _microbatch_traffic(job: Job, layout: Layout, stage: Stage, s: Shares) -> Iterable[Traffic]:
    layers, forwards = stage.total_layers + stage.mtp, 2 if layout.parallel.recompute else 1
    yield from (t.times(forwards * layers) for t in layer_traffic(job, layout, s, backward=False))
    yield from (t.times(layers) for t in layer_traffic(job, layout, s, backward=True))
    yield from (t.times(2) for t in (*ends_traffic(job, layout, stage, s), *pipeline_traffic(job, layout, s)))


def _layer(job: Job, layout: Layout, s: Shares, device: Device, backward: bool) -> Seconds:
    """Seconds of one decoder layer on one rank, without its traffic."""
    m, tp = job.model, layout.parallel.tp
    whole = m.forward_flops(s.cp, 0, 0) // m.num_hidden_layers
    experts, router = 2 * s.cp * m.top_k * m.expert_parameters, 2 * s.cp * m.num_experts * m.hidden_size / tp
    projections = (whole - experts) / tp - router
    mine = 2 * s.expert_rows * m.expert_parameters
    pairs = m.forward_flops(0, s.pairs, 0) / m.num_hidden_layers / tp
    elementwise = _elementwise_bytes(job, layout, s, backward) / device.hbm.value
    fp8_dense = m.fp8_dense and job.cluster.runs_on == "cuda"
    if not backward:
        by_experts = mine / (device.fp8_gemm if m.fp8_experts else device.grouped_gemm).value
        dense = (device.fp8_gemm if fp8_dense else device.gemm).value
        return {"products": projections / dense + router / device.fp32_gemm.value, "experts": by_experts,
                "attention": pairs / device.attention_forward.value, "elementwise": elementwise, "host": device.host.value}
    by_input, by_weight = (device.fp8_gemm, device.fp8_wgrad) if m.fp8_experts else (device.grouped_gemm, device.grouped_gemm)
    dense = 1 / device.fp8_gemm.value + 1 / device.fp8_wgrad.value if fp8_dense else 2 / device.gemm.value
    return {"products": projections * dense + 2 * router / device.fp32_gemm.value,
            "experts": mine / by_input.value + mine / by_weight.value,
            "attention": 2.5 * pairs / device.attention_backward.value, "elementwise": elementwise, "host": device.host.value}


def _elementwise_bytes(job: Job, layout: Layout, s: Shares, backward: bool) -> float:
    """Bytes that a layer's element-wise kernels read and write in one pass. A backward reads and writes about twice its forward's:
    the gradient beside the values."""
    m, w = job.model, Widths.of(job, layout)
    hidden, f = w.hidden, m.intermediate_size
    tokens = 26 * hidden + 8 * m.num_experts  # two norms 8, two sums 12, the router's fp32 input 6; its logits there and back
    heads = 4 * (w.q + w.kv)  # norm and rotation
    if m.fp8_experts:
        rows = (2 + 1) * hidden + (4 + 1) * f + 2 * hidden  # quantised on the way in, SwiGLU quantised, read for the sum
    elif job.cluster.runs_on == "cpu" or job.options.lean_experts:
        rows = 4 * hidden + 6 * f + 2 * hidden  # permuted, SwiGLU, read for the sum
    else:
        rows = 4 * hidden + 2 * hidden + 8 * hidden + 22 * f  # torch's kernel: masked copies of input, hidden, product, output; SwiGLU
    forward = s.rank * tokens + s.cp * heads + s.layout_rows * rows
    if layout.parallel.ep > 1:
        forward += s.sent * 6 * hidden + s.rank * 2 * hidden  # packed into messages 4; sums of what came back
    weights = 3 * w.experts * m.expert_parameters if m.fp8_experts else 0  # read in bf16, written as codes
    if not backward:
        return forward + weights
    if m.fp8_experts:  # SwiGLU's gradient, in fp32 tensors or one kernel; four operands quantised by columns, two of them from codes
        gradient = 8 * f if job.options.lean_experts else 80 * f
        return 2 * forward + s.layout_rows * (gradient + 12 * hidden + 18 * f)
    return 2 * forward


def _ends(job: Job, layout: Layout, stage: Stage, s: Shares, device: Device) -> Seconds:
    """Head and MTP projections, forward and backward."""
    m, tp = job.model, layout.parallel.tp
    if not stage.head:
        return {}
    logits = m.forward_flops(0, 0, (1 + stage.mtp) * s.cp) / tp
    joins = (m.forward_flops(0, 0, 0, s.rank) - m.forward_flops(s.rank, 0, 0) // m.num_hidden_layers) * stage.mtp
    # the backward makes the logits once more
    return {"products": (4 * logits + 3 * joins) / device.gemm.value}


def _optimizer(job: Job, layout: Layout, stage: Stage, device: Device) -> float:
    """Of each shard reads gradient, master and moments, writes master, moments and weight; the norm reads the gradient once more."""
    total = 0.0
    for g in stage_weights(job, layout, stage):
        if g.trained:
            shard = g.count / layout.sharding.shards(g.replicas, g.part)
            total += (4 + 4 * 4 + 3 * 4 + 2) * shard
    return total / device.hbm.value


# ---- the pipeline -----------------------------------------------------------------------------------------------------------------


def _total(seconds: Seconds) -> float:
    return sum(seconds.values())


def _weight_gradients(job: Job, layout: Layout, stage: Stage, s: Shares, device: Device) -> float:
    """Seconds of one microbatch's products that give gradients of weights."""
    backward = _layer(job, layout, s, device, backward=True)
    return (stage.total_layers + stage.mtp) * (backward["products"] + backward["experts"]) / 2


def _bubble(parallel: ParallelConfig, microbatches: int, others: float, weight_gradients: float) -> float:
    """Seconds in which the slowest stage waits.

    A microbatch passes through all other stages once while the slowest one has nothing of it to do; chunks divide that by their number
    (arXiv:2104.04473), and zero bubble fills it with weight gradients: of a stage's F + B, W in it, F + B - 2 W remain
    (arXiv:2401.10241). Where a V has fewer than two rounds of microbatches, its way back does not help.

    Args:
        others: seconds of one microbatch on all other stages; weight_gradients: W of the slowest.
    """
    if parallel.schedule in SPLIT_BACKWARD:
        others = max(0.0, others - (parallel.pp - 1) * 2 * weight_gradients)
    short = parallel.schedule == "zbv" and microbatches < 2 * parallel.pp
    return others / (1 if short else parallel.vpp)
