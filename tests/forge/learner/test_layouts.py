"""A step on merged samples over several ranks equals the step on every sample alone on one."""

from __future__ import annotations

import pytest
import torch

from megatron_m2.forge.learner.learner import LearnerConfig
from megatron_m2.forge.learner.losses import PolicyLossConfig
from megatron_m2.forge.learner.objective import DraftConfig
from megatron_m2.forge.learner.plan import Budget
from megatron_m2.parallel.collectives import total
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import build_mesh
from megatron_m2.parallel.placement import placement_of
from megatron_m2.parallel.sharding import Sharding
from tests.conftest import tiny_config
from tests.forge.learner.cases import every_sample_alone, recorded_first, samples_of
from tests.forge.learner.test_learner import CAP, learner_of
from tests.parallel.ranks import on_ranks

# Data parallelism takes the ranks that a layout leaves of four. Few samples leave some ranks microbatches that train nothing.
LAYOUTS = [{"tp": 2}, {"ep": 2}, {"pp": 2}, {"cp": 2}, {}, {"pp": 2, "tp": 2}, {"cp": 2, "ep": 2},
           {"pp": 2, "vpp": 2, "schedule": "zero_bubble", "ep": 2}, {"cp": 2, "tp": 2, "ep": 4, "recompute": True}]
IN_PIECES = {"recompute": True}  # data parallel, with trees over the budget
EXACT = [(torch.float64, 1e-10), (torch.float32, 1e-5)]
MODEL = {"num_hidden_layers": 3}


def config(top_k, budget=40, piece_tokens=0):
    return LearnerConfig(PolicyLossConfig(cap=CAP), DraftConfig(0.3, top_k), Budget(budget), piece_tokens)


def batches():
    model = tiny_config(**MODEL)
    many = samples_of(11, 14, model=model, routed="anyhow", length=9)
    return {"many": (many, recorded_first(many, everywhere=False)[0]), "few": (many[:2], recorded_first(many[:2], everywhere=False)[0])}


def expected(dtype, top_k):
    learner = learner_of(config(top_k), dtype, **MODEL)
    return {name: every_sample_alone(learner.stages.stages[0], trained, CAP, 0.3, top_k) for name, (_, trained) in batches().items()}


def compare(dtype, tolerance, expected_by_top_k):
    for i, sizes in enumerate([*LAYOUTS, IN_PIECES]):
        top_k = (5, 0)[i % 2]
        parallel = ParallelConfig(**sizes)
        asked, mesh = config(top_k, 9, 4) if sizes is IN_PIECES else config(top_k), build_mesh(parallel, "cpu", 2)
        learner = learner_of(asked, dtype, mesh, parallel, Sharding(zero=0), **MODEL)
        for name, (samples, _) in batches().items():
            alone = expected_by_top_k[top_k][name]
            objective, counts = learner.forward_backward(learner.prepare(samples))
            assert torch.equal(counts, alone.counts), (sizes, name)
            losses = total(objective.sums, learner.mesh.world)
            assert losses[0] == pytest.approx(alone.policy, rel=tolerance), (sizes, name)
            assert losses[1] == pytest.approx(alone.draft, rel=tolerance), (sizes, name)
            check_gradients(learner, alone.grads, tolerance, (sizes, name))
    result = learner.step(samples, 1e-3, 0)  # its metrics are gathered over ranks
    assert result.metrics["policy/ratio_max"] > 0


def check_gradients(learner, grads, tolerance, what):
    largest = max(float(g.abs().max()) for g in grads.values())
    learner.optimizer.gradients.finish()
    masters = {n: g for b in learner.optimizer.gradients.buckets for n, g in zip(b.names, b.gradients(), strict=True)}
    for name, p in learner.stages.named_parameters():
        whole = grads[name]
        mine = masters[name] if name in masters else torch.zeros_like(p) if p.grad is None else p.grad
        error = float((mine - placement_of(p).of(whole)).abs().max()) if mine.numel() else 0.0
        assert error <= tolerance * max(float(whole.abs().max()), 1e-2 * largest), (what, name, error)
    learner.optimizer.gradients.reset()


@pytest.mark.parametrize(("dtype", "tolerance"), EXACT)
def test_ranks_together_equal_every_sample_alone(dtype, tolerance):
    on_ranks(4, compare, dtype, tolerance, {top_k: expected(dtype, top_k) for top_k in (5, 0)})
