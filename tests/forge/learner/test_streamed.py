"""The policy's loss of a tree that is trained in pieces: sums, metrics, gradients and expert counts are those of the tree at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_m2.forge.learner.learner import LearnerConfig
from megatron_m2.forge.learner.losses import PolicyLossConfig
from megatron_m2.forge.learner.objective import DraftConfig, PolicyObjective
from megatron_m2.forge.learner.plan import Budget
from tests.forge.learner.cases import samples_of
from tests.forge.learner.test_learner import CAP, assert_same_gradients, learner_of, shapes


@settings(max_examples=30)
@given(shapes, st.sampled_from([5, 0]), st.integers(1, 12))
def test_the_policy_learns_the_same_in_pieces(shape, top_k, piece_tokens):
    config = LearnerConfig(PolicyLossConfig(cap=CAP), DraftConfig(0.3, top_k), Budget(500))
    learner = learner_of(config)
    model, work = learner.stages.stages[0], learner.prepare(samples_of(**shape))
    objective, counts = learner.forward_backward(work)
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    drafts, forests = model.config.num_mtp_modules, len(work.mine)
    streamed = PolicyObjective(work.mine, work.scale_S, config.loss, config.draft, drafts, forests, model.device)
    found = sum(learner.stages.stream(m.forest, streamed, i, piece_tokens, asked=streamed.asked) for i, m in enumerate(work.mine))
    assert torch.equal(found, counts)
    assert streamed.sums.tolist() == pytest.approx(objective.sums.tolist(), rel=1e-10, abs=1e-10)
    assert streamed.pair_metrics.result(3) == pytest.approx(objective.pair_metrics.result(3), rel=1e-8)
    assert_same_gradients(model, expected, 1e-10)
