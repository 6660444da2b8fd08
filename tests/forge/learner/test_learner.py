"""A step on merged samples equals the step on every sample alone: losses, every gradient, expert counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_m2.forest import TokenForest
from megatron_m2.forge.learner.learner import Learner, LearnerConfig
from megatron_m2.forge.learner.losses import PolicyLossConfig
from megatron_m2.forge.learner.objective import DraftConfig
from megatron_m2.forge.learner.plan import Budget
from megatron_m2.model.m2 import Asked
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import ONE
from megatron_m2.training.config import OptimConfig
from megatron_m2.training.metrics import MACHINE_PREFIXES
from megatron_m2.training.optimizer import MasterAdamW
from megatron_m2.training.stages import ModelStages
from tests.conftest import tiny_config
from tests.forge.learner.cases import every_sample_alone, path_of, recorded_first, samples_of

CAP = 1.5  # low enough to clip many
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def learner_of(config=None, dtype=torch.float64, mesh=ONE, parallel=None, sharding=None, device="cpu", **model):
    model = tiny_config(**{"num_mtp_modules": 2, **model})
    stages = ModelStages(model, parallel or ParallelConfig(), mesh, dtype, device, seed=1)
    for row, router in stages.routers():
        router.bias.copy_(torch.randn(model.num_experts, generator=torch.Generator().manual_seed(row)) * 0.05)
    optimizer = MasterAdamW(stages.named_parameters(), OptimConfig(eps=1e-15), mesh, sharding, apart="mtp.")
    config = config or LearnerConfig(loss=PolicyLossConfig(cap=CAP), draft=DraftConfig(0.3, 5))
    return Learner(config, stages, optimizer)


def assert_same_gradients(model, expected, tolerance):
    """Relative to each weight's largest; one that is 0 but for rounding (queries of a lone token) is measured by the whole model's."""
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, p in model.named_parameters():
        actual = torch.zeros_like(p) if p.grad is None else p.grad
        error, scale = float((actual - expected[name]).abs().max()), float(expected[name].abs().max())
        assert error <= tolerance * max(scale, 1e-2 * largest), (name, error, scale)


def assert_equal_alone(learner, samples, as_trained, tolerance):
    """Samples merged, and ``as_trained`` each alone."""
    model = learner.stages.stages[0]
    config = learner.config
    alone = every_sample_alone(model, as_trained, config.loss.cap, config.draft.weight, config.draft.top_k)
    objective, counts = learner.forward_backward(learner.prepare(samples))
    assert torch.equal(counts, alone.counts)
    assert objective.sums[0] == pytest.approx(alone.policy, rel=tolerance, abs=tolerance)
    assert objective.sums[1] == pytest.approx(alone.draft, rel=tolerance, abs=tolerance)
    assert_same_gradients(model, alone.grads, tolerance)


shapes = st.fixed_dictionaries({"seed": st.integers(0, 2**20), "count": st.integers(1, 9), "length": st.integers(2, 12),
                                "branching": st.integers(1, 6), "parents": st.booleans()})


@settings(max_examples=120)
@given(shapes, st.sampled_from([5, 0]), st.sampled_from([20, 60, 10_000]))
def test_merged_equals_alone(shape, top_k, budget):
    """Partitioned too: the smaller budgets cut most trees."""
    samples = samples_of(**shape)
    longest = max(len(path_of(s, samples).tokens) for s in samples)
    config = LearnerConfig(PolicyLossConfig(cap=CAP), DraftConfig(0.3, top_k), Budget(max(budget, longest)))
    assert_equal_alone(learner_of(config), samples, samples, TOLERANCE[torch.float64])


@settings(max_examples=40)
@given(shapes, st.sampled_from([5, 0]), st.integers(1, 9), st.sampled_from(["", "anyhow"]))
def test_trees_over_the_budget_are_streamed(shape, top_k, piece_tokens, routed):
    samples = samples_of(**shape, model=tiny_config(), routed=routed)
    config = LearnerConfig(PolicyLossConfig(cap=CAP), DraftConfig(0.3, top_k), Budget(7), piece_tokens)
    learner = learner_of(config)
    work = learner.prepare(samples)
    assert bool(work.streamed) == (max(len(path_of(s, samples).tokens) for s in samples) > 7)
    as_replayed = recorded_first(samples, everywhere=False)[0] if routed else samples
    assert_equal_alone(learner, samples, as_replayed, TOLERANCE[torch.float64])


def test_without_pieces_a_sample_over_the_budget_is_refused():
    samples = samples_of(7, 9)
    long = [s.name for s in samples if len(s.tokens) > 7]
    result = learner_of(LearnerConfig(budget=Budget(7))).step(samples, 1e-3, 0)
    assert [r.name for r in result.refusals if r.name.startswith("s")] == long != []
    assert "a microbatch holds 7" in result.refusals[0].reason


@settings(max_examples=60)
@given(shapes, st.sampled_from([5, 0]), st.booleans())
def test_merged_equals_alone_in_fp32(shape, top_k, recompute):
    samples = samples_of(**shape)
    config = LearnerConfig(PolicyLossConfig(cap=CAP), DraftConfig(0.3, top_k), Budget(500))
    learner = learner_of(config, torch.float32, parallel=ParallelConfig(recompute=recompute))
    assert_equal_alone(learner, samples, samples, TOLERANCE[torch.float32])


@settings(max_examples=60)
@given(shapes, st.sampled_from(["alike", "anyhow"]), st.sampled_from(["split", "first"]), st.booleans())
def test_routes_are_replayed(shape, routed, conflict, recompute):
    model = tiny_config()
    samples = samples_of(**shape, model=model, routed=routed)
    config = LearnerConfig(PolicyLossConfig(cap=CAP), DraftConfig(0.3, 5), Budget(500), routes=conflict)
    learner = learner_of(config, parallel=ParallelConfig(recompute=recompute))
    as_replayed, recorded, differing = recorded_first(samples, everywhere=conflict == "first")
    work = learner.prepare(samples)
    assert work.routes == (recorded, differing)
    assert routed == "anyhow" or differing == 0
    if differing == 0:
        assert len(work.merged.forest) == len(learner.prepare([replace(s, routes=None) for s in samples]).merged.forest)
    assert_equal_alone(learner, samples, as_replayed, TOLERANCE[torch.float64])


@settings(max_examples=20)
@given(shapes, st.sampled_from(["grpo", "dapo", "policy_gradient"]))
def test_losses_that_are_not_linear_are_merged_exactly(shape, name):
    """Every pair's own loss, differentiated through its own sample."""
    samples = samples_of(**shape)
    loss = PolicyLossConfig(name=name, denominator="batch")
    learner = learner_of(LearnerConfig(loss, DraftConfig(0), Budget(500)))
    model = learner.stages.stages[0]
    tokens = sum(s.weight * s.trainable.sum() for s in samples)
    expected = 0.0
    for s in (path_of(s, samples) for s in samples):
        weight = torch.from_numpy(s.trainable.astype(np.float32))
        out = model(replace(TokenForest.from_documents([s.tokens]), weight=weight))
        old, advantages = (torch.from_numpy(x[s.trainable]).double() for x in (s.old_logprobs, s.advantages))
        logprobs = out.logprobs[weight > 0]
        r = (logprobs - old).exp()
        high = {"grpo": 1.2, "dapo": 1.28}.get(name)
        each = advantages * logprobs if high is None else torch.minimum(r * advantages, r.clamp(0.8, high) * advantages)
        expected = expected - s.weight / tokens * each.sum()
    expected.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    objective, _ = learner.forward_backward(learner.prepare(samples))
    assert objective.sums[0] == pytest.approx(expected.item(), rel=1e-10)
    assert_same_gradients(model, grads, 1e-10)


@pytest.mark.parametrize("sharing", ["chains", "none"])
def test_less_sharing_is_the_same_step(sharing):
    samples = samples_of(5, 12, parents=True, model=tiny_config(), routed="alike")
    config = LearnerConfig(PolicyLossConfig(cap=CAP), DraftConfig(0.3, 5), Budget(500), sharing=sharing)
    learner = learner_of(config)
    tree, less = (len(learner.prepare(samples, s).merged.forest) for s in ("tree", sharing))
    assert tree < less <= sum(len(path_of(s, samples).tokens) for s in samples)
    assert_equal_alone(learner, samples, samples, 1e-10)


def test_chains_are_those_that_grow_and_never_branch():
    """Of 1 2 3 / 1 2 3 4 / 1 2 3 5 / 1 2 the third cannot join, since its chain has gone on, and the fourth is no end."""
    samples = [replace(s, tokens=np.array(t), trainable=np.arange(len(t)) == len(t) - 1, old_logprobs=np.zeros(len(t), np.float32),
                       advantages=np.zeros(len(t), np.float32), versions=None)
               for s, t in zip(samples_of(0, 2), ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 5], [1, 2]), strict=True)]
    forest = learner_of().prepare(samples, "chains").merged.forest
    assert forest.tokens.tolist() == [1, 2, 3, 4, 1, 2, 3, 5, 1, 2]
    assert forest.parent.tolist() == [-1, 0, 1, 2, -1, 4, 5, 6, -1, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_repeat_bit_for_bit(dtype):
    samples = samples_of(3, 20, model=tiny_config(), routed="anyhow")

    def run():
        learner = learner_of(dtype=dtype)
        metrics = [learner.step(samples, 1e-3, version).metrics for version in range(3)]
        return [{k: v for k, v in m.items() if not k.startswith(MACHINE_PREFIXES)} for m in metrics], learner.stages.state_dict()

    (metrics, state), (again, state_again) = run(), run()
    assert metrics == again
    assert all(torch.equal(value, state_again[name]) for name, value in state.items())


def test_a_step_reports_what_it_did():
    samples = samples_of(3, 20)
    learner = learner_of()
    learner.calibrate(samples)
    before = {n: p.detach().clone() for n, p in learner.stages.named_parameters()}
    model = learner.stages.stages[0]
    paths = [s.tokens.tolist() for s in samples]
    unique = len({tuple(p[: t + 1]) for p in paths for t in range(len(p))})
    entropies = []
    for s in samples:
        out = model(TokenForest.from_documents([s.tokens]), asked=Asked(draft_top_k=5))
        p = model.head(out.hidden_states).softmax(-1)
        entropies += (-(p * p.log()).sum(-1))[np.flatnonzero(s.trainable) - 1].tolist()
    result = learner.step(samples, 1e-3, version=3)
    m = result.metrics
    assert (m["tree/tokens"], m["tree/unique_tokens"]) == (sum(map(len, paths)), unique)
    assert m["tree/token_ratio"] == sum(map(len, paths)) / m["tree/computed_tokens"]
    assert 1 < m["tree/ceiling"] < 2 * m["tree/token_ratio"]
    assert m["policy/entropy"] == pytest.approx(np.mean(entropies), rel=1e-9)
    assert m["policy/staleness_mean"] == pytest.approx(np.mean([3 - v for s in samples for v in s.versions[s.trainable]]))
    assert all(0 < m[f"draft/acceptance_{k}"] < 1 for k in (1, 2))
    assert {"time/forward_s", "time/backward_s", "time/optimizer_s", "time/communication_s", "throughput/share_of_ceiling"} <= m.keys()
    assert m["optim/draft_grad_norm"] > 0
    assert result.refusals == []
    assert all(not torch.equal(p, before[n]) for n, p in learner.stages.named_parameters())


def test_drafts_train_themselves_alone():
    """Their loss has no gradient for the policy, and the policy's none for them."""
    samples = samples_of(4, 8)
    grads = {}
    for weight in (0.0, 0.3):
        learner = learner_of(LearnerConfig(PolicyLossConfig(cap=CAP), DraftConfig(weight, 5), Budget(500)))
        learner.forward_backward(learner.prepare(samples))
        grads[weight] = {n: None if p.grad is None else p.grad.clone() for n, p in learner.stages.named_parameters()}
    for name, grad in grads[0.3].items():
        if name.startswith("mtp."):
            assert grads[0.0][name] is None or not grads[0.0][name].any()
            assert grad.any(), name
        else:
            assert torch.equal(grad, grads[0.0][name]), name


def test_recomputed_anchor_is_this_policy():
    samples = samples_of(6, 9, parents=True)
    learner = learner_of(LearnerConfig(budget=Budget(60)))
    anew = learner.recompute(samples)
    model = learner.stages.stages[0]
    for s, old in zip(anew, samples, strict=True):
        whole = path_of(old, samples)
        out = model(TokenForest.from_documents([whole.tokens]))
        own = out.logprobs[-len(s.tokens) :].detach().float().numpy()
        np.testing.assert_allclose(s.old_logprobs[s.trainable], own[s.trainable], rtol=1e-6)
        assert (s.old_logprobs[~s.trainable] == 0).all()
    metrics = learner.step(anew, 0.0, version=0).metrics
    assert metrics["policy/logprob_gap_all_max_abs"] < 1e-6
    assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-6)


def test_what_cannot_be_trained_is_named_and_the_rest_is_trained():
    good = samples_of(7, 8)
    bad = replace(good[0], name="nan", old_logprobs=np.full(len(good[0].tokens), np.nan, np.float32))
    learner = learner_of()
    assert_equal_alone(learner, [bad, *good], good, 1e-10)
    result = learner_of().step([*good, bad], 1e-3, 0)
    assert [r.name for r in result.refusals] == ["nan"]
    assert result.metrics["data/refused"] == 1
    with pytest.raises(ValueError, match=r"samples: none can be trained; nan: old_logprobs\[\d+\] = nan"):
        learner.step([bad], 1e-3, 0)
