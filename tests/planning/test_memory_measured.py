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
from megatron_m2.ops import grouped_gemm
from megatron_m2.ops.router import update_router_bias
from megatron_m2.parallel.collectives import total
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import build_mesh
from megatron_m2.parallel.sharding import Sharding
from megatron_m2.planning import activations
from megatron_m2.planning.job import Job, Layout, Options, legal, stages
from megatron_m2.planning.memory import stage_memory
from megatron_m2.planning.tokens import shares
from megatron_m2.planning.traffic import ends_traffic, layer_traffic, replica_traffic
from megatron_m2.training.memory import peak_bytes
from tests.conftest import needs_kernels
from tests.parallel.ranks import on_ranks
from tests.planning.measure import SentBytes, Trained, job_of, kept_bytes

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
    layer = activations.layer_input(s, hidden) if layout.parallel.recompute else whole
    return {"layers": job.model.num_hidden_layers * layer,
            "mtp": mtp * (activations.mtp_kept(job, layout, s) + (0 if layout.parallel.recompute else whole)),
            "rest": activations.head_kept(job, s) + activations.batch_kept(job, s)}


def compare_kept(job: Job, layout: Layout, trained: Trained) -> None:
    measured, expected = kept_bytes(trained.model, trained.forests[0]), estimated_kept(job, layout)
    near(trained.fullest(sum(measured.values())), sum(expected.values()), f"kept, {layout.parallel}")
    if not layout.parallel.recompute:
        near(trained.fullest(measured["layers"]), expected["layers"], f"kept by the layers, {layout.parallel}")


def compare_peak(job: Job, layout: Layout, trained: Trained, place: int = 0) -> None:
    expected = stage_memory(job, layout, place)
    weights, sums, state = trained.standing_bytes()
    assert weights == expected.weights
    near(state, expected.optimizer, "optimizer")  # shards are filled up to equal lengths
    if layout.sharding.zero == 2:  # its reductions belong to the backward
        assert sums == 4 * job.model.vocab_size * job.model.hidden_size  # the embedding's, which MTP modules use too
        return
    # gloo's threads let go of their messages when they come to it: the least of several steps is what the step itself needs
    above = []
    for _ in range(2 if dist.is_initialized() else 1):
        above.append(sums + peak_bytes(trained.accumulate))
        trained.optimizer.step(0.0)
    most = trained.fullest(min(above))
    near(weights + state + most, expected.total, f"peak of a step, {layout.parallel}")
    near(most, expected.total - expected.weights - expected.optimizer, f"the same beyond weights and optimizer, {layout.parallel}")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("mtp", "fp8", "aux"), [(0, False, 0.0), (2, False, 0.01), (0, True, 0.0), (1, True, 0.0)])
def test_one_rank(recompute, mtp, fp8, aux):
    torch.set_num_threads(1)
    config = replace(MODEL, num_mtp_modules=mtp, fp8_experts=fp8, router_aux_loss_coef=aux)
    job, layout = job_of(config, 1, 256, 2048), Layout(ParallelConfig(recompute=recompute), 1024)
    trained = Trained(job, layout)
    compare_kept(job, layout, trained)
    compare_peak(job, layout, trained)


@pytest.mark.parametrize("shape", [{"hidden_size": 64, "intermediate_size": 512}, {"num_experts": 128, "top_k": 8}, {"vocab_size": 20_000},
                                   {"num_attention_heads": 32, "num_key_value_heads": 8}])
def test_other_shapes(shape):
    """Wide experts, many experts, a large vocabulary, wide attention: each makes another part the largest."""
    torch.set_num_threads(1)
    job, layout = job_of(replace(MODEL, num_hidden_layers=3, **shape), 1, 512, 1024), Layout(ParallelConfig(), 512)
    trained = Trained(job, layout)
    compare_kept(job, layout, trained)
    compare_peak(job, layout, trained)


def test_experts_by_torch_as_on_a_gpu(monkeypatch):
    """Where our bf16 kernel does not run, torch's grouped product keeps masked copies."""
    monkeypatch.setattr(grouped_gemm, "_kernel_takes", lambda *_: False)
    monkeypatch.setattr(grouped_gemm, "_product_of", lambda *_: grouped_gemm.grouped_mm_by_torch)
    job, layout = job_of(MODEL, 1, 256, 2048), Layout(ParallelConfig(), 1024)
    compare_kept(replace(job, cluster=replace(job.cluster, runs_on="cuda")), layout, Trained(job, layout))


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
    for sizes, zero in layouts:
        layout = Layout(ParallelConfig(**sizes), 512, Sharding(zero, bucket_bytes=1 << 20))
        parallel = layout.parallel
        mesh = build_mesh(parallel, "cpu", config.num_key_value_heads)
        microbatches = 2 * parallel.pp
        job = job_of(config, mesh.world.size, seq_len, microbatches * mesh.dp.size * 512)
        legal(job, layout)
        trained = Trained(job, layout, mesh, microbatches)
        job = replace(job, options=Options(imbalance=balanced(trained, mesh)))
        compare_peak(job, layout, trained, mesh.pp.rank)
        if parallel.pp == 1:
            compare_kept(job, layout, trained)
        compare_sent(job, layout, trained, mesh)


def balanced(trained: Trained, mesh) -> float:
    """Balances the routers as training does.

    Returns:
        What imbalance is left, which the planner is told: rows of the most loaded expert rank over the mean, all layers together.
    """
    counts = torch.zeros(0)
    for rate in (0.02, 0.02, 0.02, 0.01, 0.01, 0.005, 0.005, 0.0):
        counts = total(trained.stages.evaluate(trained.forests[:1], lambda number, output: None), mesh.world)
        for row, router in trained.stages.routers():
            update_router_bias(router.bias, counts[row], rate)
    loads = counts.sum(0).view(mesh.ep.size, -1).sum(1)
    return float(loads.max() / loads.double().mean())


def compare_sent(job: Job, layout: Layout, trained: Trained, mesh) -> None:
    """A whole step's bytes, of each kind those of the rank of this stage that sends most."""
    parallel, s, n = layout.parallel, shares(job, layout), len(trained.forests)
    stage = stages(job, layout)[mesh.pp.rank]
    layers = stage.total_layers + stage.mtp
    expected: dict[str, float] = {}
    passes = [*layer_traffic(job, layout, s, backward=True), *layer_traffic(job, layout, s, backward=False) * (1 + parallel.recompute)]
    every = [*(t.times(n * layers) for t in passes), *(t.times(2 * n) for t in ends_traffic(job, layout, stage, s)),
             *replica_traffic(job, layout, stage, n)]
    for t in every:
        expected[t.kind] = expected.get(t.kind, 0.0) + t.bytes
    with SentBytes({"world": mesh.world, "pp": mesh.pp, "sequence": mesh.sequence, "ep": mesh.ep, "cp": mesh.cp, "tp": mesh.tp}) as sent:
        trained.step()
    for kind in ("tp", "cp", "ep", "dp"):
        most = trained.fullest(sent.sums[kind])
        # keys go one way and their gradients the other: no rank is the busiest both times
        if expected.get(kind) and kind != "cp":
            near(most, expected[kind], f"sent by {kind}, {layout.parallel}")
        elif expected.get(kind):
            assert 0.5 * expected[kind] < most < 1.02 * expected[kind], (most, expected[kind])


TWOS = [({"tp": 2}, 0), ({"cp": 2}, 1), ({"ep": 2}, 1), ({"cp": 2, "recompute": True}, 2), ({"pp": 2}, 0),
        ({"pp": 2, "vpp": 2, "schedule": "zbv"}, 0)]
FOURS = [({"tp": 2, "ep": 4}, 1), ({"cp": 2, "tp": 2, "ep": 2}, 1), ({"pp": 2, "vpp": 2, "schedule": "interleaved", "ep": 2}, 1)]


@pytest.mark.parametrize(("ranks", "layouts"), [(2, TWOS), (4, FOURS)])
def test_on_ranks(ranks, layouts):
    """Of chains as long as the forest, so that context parallelism has keys to send; with an MTP module."""
    on_ranks(ranks, rank_work, layouts, 512, replace(MODEL, num_hidden_layers=3, num_mtp_modules=1))
