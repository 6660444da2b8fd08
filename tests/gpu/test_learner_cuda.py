"""A learner's step on merged samples on the GPU: equal to every sample alone there, and the same bits twice."""

from __future__ import annotations

import pytest
import torch

from megatron_m2.forge.learner.learner import LearnerConfig
from megatron_m2.forge.learner.losses import PolicyLossConfig
from megatron_m2.forge.learner.objective import DraftConfig
from megatron_m2.forge.learner.plan import Budget
from tests.conftest import tiny_config
from tests.forge.learner.cases import recorded_first, samples_of
from tests.forge.learner.test_learner import CAP, assert_equal_alone, learner_of
from tests.gpu import DEVICE, needs_gpu

pytestmark = needs_gpu


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("top_k", [5, 0])
def test_merged_equals_alone(dtype, tolerance, top_k):
    samples = samples_of(3, 9, model=tiny_config(), routed="anyhow", parents=True)
    config = LearnerConfig(PolicyLossConfig(cap=CAP), DraftConfig(0.3, top_k), Budget(60))
    assert_equal_alone(learner_of(config, dtype, device=DEVICE), samples, recorded_first(samples, everywhere=False)[0], tolerance)


def test_coefficients_repeat_bit_for_bit():
    """Sums over the pairs of a token go in one order."""
    samples = samples_of(3, 40, length=4, vocab=3)
    learner = learner_of(dtype=torch.bfloat16, device=DEVICE)
    losses = [learner.forward_backward(learner.prepare(samples))[0].sums for _ in range(2)]
    assert torch.equal(*losses)
