"""The planner's memory beside real training: within 10 % of what autograd keeps, of what torch's allocator holds at most, and of what
the process takes from the system."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_m2.model.config import ModelConfig
from megatron_m2.model.m2 import build_model
from megatron_m2.ops import grouped_gemm
from megatron_m2.ops.router import update_router_bias
from megatron_m2.parallel.collectives import total
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import build_mesh
from megatron_m2.planning import activations
from megatron_m2.planning.job import Job, Layout, Options, stages
from megatron_m2.planning.memory import stage_memory
from megatron_m2.planning.tokens import shares
from megatron_m2.planning.traffic import ends_traffic, layer_traffic
from tests.conftest import needs_kernels
from tests.parallel.ranks import on_ranks
from tests.planning.measure import Trained, chains, job_of, kept_bytes, peak_bytes, sent_bytes

pytestmark = needs_kernels  # without them other code runs, which keeps other things

TOLERANCE = 0.10  # what the planner promises; the sums below are mostly within 2 %

MODEL = ModelConfig(vocab_size=2048, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
                    rotary_dim=16, num_experts=16, top_k=4, intermediate_size=128, max_position_embeddings=4096)


def near(measured: float, estimated: float, what: str) -> None:
    assert abs(measured / estimated - 1) < TOLERANCE, f"{what}: measured {measured:,.0f}, estimated {estimated:,.0f}"


def estimated_kept(job: Job, layout: Layout) -> dict[str, int]:
    """By the parts that :func:`~tests.planning.measure.kept_bytes` tells apart."""
    s, mtp = shares(job, layout), job.model.num_mtp_modules
    whole, hidden = sum(activations.layer_kept(job, layout, s).values()), job.model.hidden_size
    layer = activations.layer_input(s, hidden) if layout.recompute else whole
    return {"layers": job.model.num_hidden_layers * layer,
            "mtp": mtp * (activations.mtp_kept(job, layout, s) + (0 if layout.recompute else whole)),
            "rest": activations.head_kept(job, s) + activations.batch_kept(job, s)}


def compare_kept(job: Job, layout: Layout, model, forest) -> None:
    measured, expected = kept_bytes(model, forest), estimated_kept(job, layout)
    near(fullest(sum(measured.values())), sum(expected.values()), "kept")
    if not layout.recompute:
        near(fullest(measured["layers"]), expected["layers"], "kept by the layers")


def compare_peak(job: Job, layout: Layout, model, forest) -> None:
    expected = stage_memory(job, layout, 0)
    trained = Trained(model, forest)
    weights, state = trained.standing_bytes()
    assert weights == expected.weights
    assert state == expected.optimizer
    # gloo's threads let go of their messages when they come to it: the least of several steps is what the step itself needs
    above = fullest(min(peak_bytes(trained.step) for _ in range(2 if dist.is_initialized() else 1)))
    near(weights + state + above, expected.total, "peak of a step")
    near(above, expected.gradients + expected.activations + expected.working, "peak of a step beyond weights and optimizer")


def fullest(value: int) -> int:
    """The largest of all ranks'."""
    if not dist.is_initialized():
        return value
    most = torch.tensor(value)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("mtp", "fp8", "aux"), [(0, False, 0.0), (2, False, 0.01), (0, True, 0.0), (1, True, 0.0)])
def test_one_rank(recompute, mtp, fp8, aux):
    torch.set_num_threads(1)
    config = replace(MODEL, num_mtp_modules=mtp, fp8_experts=fp8, router_aux_loss_coef=aux)
    job, layout = job_of(config, 1, 256, 2048), Layout(ParallelConfig(), 1024, recompute=recompute, zero=0)
    model, forest = build_model(config, torch.bfloat16, seed=0, recompute=recompute), chains(layout, 256, config.vocab_size)
    compare_kept(job, layout, model, forest)
    compare_peak(job, layout, model, forest)


@pytest.mark.parametrize("shape", [{"hidden_size": 64, "intermediate_size": 512}, {"num_experts": 128, "top_k": 8}, {"vocab_size": 20_000},
                                   {"num_attention_heads": 32, "num_key_value_heads": 8}])
def test_other_shapes(shape):
    """Wide experts, many experts, a large vocabulary, wide attention: each makes another part the largest."""
    torch.set_num_threads(1)
    config = replace(MODEL, num_hidden_layers=3, **shape)
    job, layout = job_of(config, 1, 512, 1024), Layout(ParallelConfig(), 512, zero=0)
    model, forest = build_model(config, torch.bfloat16, seed=0), chains(layout, 512, config.vocab_size)
    compare_kept(job, layout, model, forest)
    compare_peak(job, layout, model, forest)


def test_experts_by_torch_as_on_a_gpu(monkeypatch):
    """Where our bf16 kernel does not run, torch's grouped product keeps masked copies."""
    monkeypatch.setattr(grouped_gemm, "_kernel_takes", lambda *_: False)
    monkeypatch.setattr(grouped_gemm, "_product_of", lambda *_: grouped_gemm.grouped_mm_by_torch)
    job, layout = job_of(MODEL, 1, 256, 2048), Layout(ParallelConfig(), 1024, zero=0)
    job = replace(job, cluster=replace(job.cluster, runs_on="cuda"))
    model, forest = build_model(MODEL, torch.bfloat16, seed=0), chains(layout, 256, MODEL.vocab_size)
    compare_kept(job, layout, model, forest)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc's malloc how to behave")
def test_what_the_process_takes_from_the_system():
    """The system's own count, of a model whose tensors are large against everything else; malloc hands freed ones back at once."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-m", "tests.planning.rss"], cwd=root, capture_output=True, text=True, check=True, timeout=300,
                          env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)})
    taken, estimated = map(int, done.stdout.split()[-2:])
    near(taken, estimated, "resident set")


# ---- several ranks -----------------------------------------------------------------------------------------------------------------


def rank_work(layouts, seq_len: int, config: ModelConfig) -> None:
    """On every rank: what is kept, the peak and the bytes sent of each layout."""
    for sizes, recompute in layouts:
        parallel = ParallelConfig(**sizes)
        mesh = build_mesh(parallel, "cpu", config.num_key_value_heads)
        layout = Layout(parallel, 512, recompute=recompute, zero=0)
        job = job_of(config, mesh.world.size, seq_len, 4 * 512)
        model = build_model(config, torch.bfloat16, seed=0, mesh=mesh, recompute=recompute)
        forest = chains(layout, seq_len, config.vocab_size)
        job = replace(job, options=Options(imbalance=balanced(model, forest, mesh)))
        compare_kept(job, layout, model, forest)
        compare_peak(job, layout, model, forest)
        compare_sent(job, layout, model, forest, mesh)


def balanced(model, forest, mesh) -> float:
    """Balances the routers as training does.

    Returns:
        What imbalance is left, which the planner is told: rows of the most loaded expert rank over the mean, all layers together.
    """
    with torch.no_grad():
        for rate in (0.02, 0.02, 0.02, 0.01, 0.01, 0.005, 0.005):
            counts = total(model(forest).expert_counts, mesh.stage)
            for router, layer_counts in zip(model.routers(), counts, strict=True):
                update_router_bias(router.bias, layer_counts, rate)
        loads = total(model(forest).expert_counts, mesh.stage).sum(0).view(mesh.ep.size, -1).sum(1)
    return float(loads.max() / loads.double().mean())


def compare_sent(job: Job, layout: Layout, model, forest, mesh) -> None:
    axes = {"sequence": mesh.sequence, "ep": mesh.ep, "cp": mesh.cp, "tp": mesh.tp}  # a group that is two of them counts as the last
    (stage,), s = stages(job, layout), shares(job, layout)
    layers = stage.total_layers + stage.mtp
    expected = {"tp": 0.0, "cp": 0.0, "ep": 0.0}
    for t in (*(t.times(layers) for t in layer_traffic(job, layout, s, backward=False)), *ends_traffic(job, layout, stage, s)):
        expected[t.kind] += t.bytes
    with sent_bytes(axes) as sent:
        output = model(forest)
    compare_busiest(sent, expected, "forward")
    with sent_bytes(axes) as sent:
        (output.logprobs.sum() + sum(x.sum() for x in output.mtp_logprobs)).backward()
    expected = {"tp": 0.0, "cp": 0.0, "ep": 0.0}
    for backward in (True, *[False] * layout.recompute):
        for t in layer_traffic(job, layout, s, backward):
            expected[t.kind] += layers * t.bytes
    expected["tp"] += sum(t.bytes for t in ends_traffic(job, layout, stage, s))
    if layout.recompute:  # keys go one way and their gradients the other: no rank is the busiest both times
        expected["cp"] = 0.0
    compare_busiest(sent, expected, "backward")


def compare_busiest(sent: dict[str, int], expected: dict[str, float], when: str) -> None:
    """Of each kind, the rank that sends most."""
    for kind, size in expected.items():
        most = fullest(sent.get(kind, 0))
        if size:
            near(most, size, f"sent by {kind} {when}")


PAIRS = [({"tp": 2}, False), ({"cp": 2}, False), ({"ep": 2}, True)]
FOURS = [({"tp": 2, "ep": 4}, False), ({"cp": 2, "tp": 2, "ep": 2}, False), ({"cp": 4, "ep": 2}, True)]


@pytest.mark.parametrize(("ranks", "layouts"), [(2, PAIRS), (4, FOURS)])
def test_on_ranks(ranks, layouts):
    """Of chains as long as the forest, so that context parallelism has keys to send; with an MTP module."""
    on_ranks(ranks, rank_work, layouts, 512, replace(MODEL, num_hidden_layers=2, num_mtp_modules=1))
