"""Policy losses, coefficients, scales and metrics of pairs against loops over the formulas of the papers, and cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_m2.forge.learner.losses import LOSSES, PairMetrics, PolicyLossConfig, coefficients, policy_loss, scales
from megatron_m2.training.config import typed

LN2, LN10 = math.log(2), math.log(10)
CONFIGS = [PolicyLossConfig(), PolicyLossConfig(low=0.5, cap=1.5), PolicyLossConfig(cap=2.0, kl_coef=0.3), PolicyLossConfig("grpo"),
           PolicyLossConfig("grpo", eps_low=0.1, eps_high=0.6, kl_coef=0.05), PolicyLossConfig("dapo"),
           PolicyLossConfig("policy_gradient"), PolicyLossConfig("policy_gradient", kl_coef=1.0)]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- the formulas again, a pair at a time, with derivatives worked out on paper ------------------------------------------------------


def one_pair(config: PolicyLossConfig, logprob: float, old: float, advantage: float, reference: float) -> tuple[float, float, bool]:
    """Loss, its derivative and whether it was clipped."""
    ratio = math.exp(min(20.0, max(-20.0, logprob - old)))
    if config.name == "cispo":
        weight = min(config.cap, max(config.low, ratio))
        loss, slope, clipped = -weight * advantage * logprob, -weight * advantage, weight != ratio
    elif config.name == "policy_gradient":
        loss, slope, clipped = -advantage * logprob, -advantage, False
    else:
        high = 1 + (config.eps_high if config.eps_high is not None else {"grpo": 0.2, "dapo": 0.28}[config.name])
        low = 1 - (config.eps_low if config.eps_low is not None else 0.2)
        # M1 eq. 6-7: PPO leaves out what would push a ratio further beyond its bound
        clipped = (advantage > 0 and ratio > high) or (advantage < 0 and ratio < low)
        if clipped:
            loss, slope = -advantage * (high if advantage > 0 else low), 0.0
        else:
            loss, slope = -advantage * ratio, -advantage * ratio if abs(logprob - old) <= 20 else 0.0
    if config.kl_coef:
        delta = reference - logprob
        bounded = min(20.0, max(-20.0, delta))
        loss += config.kl_coef * (math.exp(bounded) - bounded - 1)
        slope += config.kl_coef * (1 - math.exp(delta)) if abs(delta) <= 20 else 0.0
    return loss, slope, clipped


pairs = st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0), st.floats(-4, 4), st.floats(-12, 0)), min_size=1, max_size=30)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@given(pairs=pairs)
def test_losses_and_coefficients_are_the_formulas(config, pairs):
    columns = [tensor(*column) for column in zip(*pairs, strict=True)]
    loss, coefficient, clipped = coefficients(config, *columns)
    expected = [one_pair(config, *pair) for pair in pairs]
    assert loss.tolist() == pytest.approx([e[0] for e in expected], rel=1e-12, abs=1e-12)
    assert coefficient.tolist() == pytest.approx([e[1] for e in expected], rel=1e-12, abs=1e-12)
    assert clipped.tolist() == [e[2] for e in expected]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_linearised_loss_has_the_gradient_of_the_loss(config):
    """Pairs of shared tokens: one log-prob times the sum of the coefficients, against autograd of the loss itself, down to the weights."""
    torch.manual_seed(3)
    weights, inputs = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(11, 5, dtype=torch.float64)
    token = torch.randint(11, (40,))
    old, reference = torch.randn(2, 40, dtype=torch.float64) - 2
    advantages, scale = torch.randn(2, 40, dtype=torch.float64)

    def logprobs() -> torch.Tensor:
        return (inputs @ weights.T).log_softmax(-1)[:, 2]

    plain, _ = policy_loss(config, logprobs()[token], old, advantages, reference)
    (expected,) = torch.autograd.grad((scale * plain).sum(), weights)
    once = logprobs()
    loss, coefficient, _ = coefficients(config, once[token], old, advantages, reference)
    summed = torch.zeros(11, dtype=torch.float64).index_add_(0, token, scale * coefficient)
    (actual,) = torch.autograd.grad((summed * once).sum(), weights)
    torch.testing.assert_close(loss, plain.detach(), rtol=0, atol=0)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_coefficients_leave_no_graph_and_work_under_no_grad():
    logprobs = tensor(-1.0, -2.0).requires_grad_()
    with torch.no_grad():
        loss, coefficient, clipped = coefficients(PolicyLossConfig("grpo"), logprobs, tensor(-1, -2), tensor(1, -1))
    assert not any(x.requires_grad for x in (loss, coefficient, clipped))
    assert logprobs.grad is None
    assert coefficient.tolist() == [-1.0, 1.0]


def test_fp32_stays_fp32():
    loss, coefficient, _ = coefficients(PolicyLossConfig(), *(torch.full((3,), -1.0) for _ in range(3)))
    assert loss.dtype == coefficient.dtype == torch.float32


# ---- by hand -------------------------------------------------------------------------------------------------------------------------


def test_cispo_by_hand():
    """Ratios 2, 10, 0.1: the cap 5 is of the ratio itself, there is no lower bound, and what is beyond the cap still has a gradient."""
    old = tensor(-1 - LN2, -1 - LN10, -3 + LN10)
    loss, coefficient, clipped = coefficients(PolicyLossConfig(), tensor(-1, -1, -3), old, tensor(3, -2, 1))
    assert loss.tolist() == pytest.approx([6.0, -10.0, 0.3], rel=1e-14)
    assert coefficient.tolist() == pytest.approx([-6.0, 10.0, -0.1], rel=1e-14)
    assert clipped.tolist() == [False, True, False]


def test_cispo_lower_bound_by_hand():
    loss, coefficient, clipped = coefficients(PolicyLossConfig(low=0.5), tensor(-3), tensor(-3 + LN10), tensor(4))
    assert (loss.item(), coefficient.item(), clipped.item()) == (pytest.approx(6.0), pytest.approx(-2.0), True)


def test_grpo_by_hand():
    """Ratios 2, 2, 1/2, 1/2 with advantages +3, -3, +3, -3: the first and the last are clipped, to 1.2 and 0.8, and have no gradient."""
    old = tensor(-1 - LN2, -1 - LN2, -1 + LN2, -1 + LN2)
    loss, coefficient, clipped = coefficients(PolicyLossConfig("grpo"), tensor(-1, -1, -1, -1), old, tensor(3, -3, 3, -3))
    assert loss.tolist() == pytest.approx([-3.6, 6.0, -1.5, 2.4], rel=1e-14)
    assert coefficient.tolist() == pytest.approx([0.0, 6.0, -1.5, 0.0], rel=1e-14)
    assert clipped.tolist() == [True, False, False, True]


def test_dapo_clips_higher_by_hand():
    """Ratio 1.25 is clipped by grpo (1.2), not by dapo (1.28); 1.5 by both."""
    logprobs, old, advantages = tensor(-1, -1), tensor(-1 - math.log(1.25), -1 - math.log(1.5)), tensor(2, 2)
    assert policy_loss(PolicyLossConfig("grpo"), logprobs, old, advantages)[0].tolist() == pytest.approx([-2.4, -2.4])
    loss, clipped = policy_loss(PolicyLossConfig("dapo"), logprobs, old, advantages)
    assert loss.tolist() == pytest.approx([-2.5, -2.56])
    assert clipped.tolist() == [False, True]


def test_policy_gradient_has_no_ratio():
    loss, coefficient, clipped = coefficients(PolicyLossConfig("policy_gradient"), tensor(-2, -2), tensor(-1, -9), tensor(3, -1))
    assert (loss.tolist(), coefficient.tolist(), clipped.tolist()) == ([6.0, -2.0], [-3.0, 1.0], [False, False])


def test_kl_by_hand():
    """k3 with pi = 1/e, reference twice as likely: 2 - 1 - ln 2, slope 1 - 2."""
    config = PolicyLossConfig("policy_gradient", kl_coef=0.5)
    loss, coefficient, _ = coefficients(config, tensor(-1), tensor(-1), tensor(0), tensor(-1 + LN2))
    assert loss.item() == pytest.approx(0.5 * (1 - LN2))
    assert coefficient.item() == pytest.approx(-0.5)


def test_a_ratio_at_its_bound_is_not_clipped():
    zero = tensor(0.0, 0.0)
    for config in (PolicyLossConfig(low=1, cap=1), PolicyLossConfig("grpo", eps_low=0, eps_high=0)):
        _, coefficient, clipped = coefficients(config, zero, zero, tensor(2, -2))
        assert coefficient.tolist() == [-2.0, 2.0]
        assert clipped.tolist() == [False, False]


def test_far_off_policy_stays_finite():
    logprobs, old = torch.tensor([-0.1, -500.0]), torch.tensor([-500.0, -0.1])
    for name in LOSSES:
        config = PolicyLossConfig(name, kl_coef=0.1)
        loss, coefficient, _ = coefficients(config, logprobs, old, torch.tensor([-1.0, -1.0]), old)
        assert loss.isfinite().all()
        assert coefficient.isfinite().all()
    _, coefficient, _ = coefficients(PolicyLossConfig(cap=math.inf), logprobs[:1], old[:1], torch.ones(1))
    assert coefficient.item() == pytest.approx(-math.exp(20), rel=1e-6)


# ---- configuration -------------------------------------------------------------------------------------------------------------------


def test_the_default_is_the_papers_cispo_with_an_absolute_cap():
    assert PolicyLossConfig().ratio_bounds == (0.0, 5.0)
    assert PolicyLossConfig(low=0.25, cap=3).ratio_bounds == (0.25, 3)
    assert PolicyLossConfig().denominator == "group"
    assert PolicyLossConfig("grpo").ratio_bounds == pytest.approx((0.8, 1.2))
    assert PolicyLossConfig("dapo").ratio_bounds == pytest.approx((0.8, 1.28))
    assert PolicyLossConfig("dapo", eps_low=0.0, eps_high=0.5).ratio_bounds == (1.0, 1.5)


def test_reads_plain_values():
    values = {"name": "grpo", "eps_high": "3e-1", "eps_low": None, "cap": 4}
    assert typed("loss", PolicyLossConfig, values) == PolicyLossConfig("grpo", cap=4.0, eps_high=0.3)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"name": "ppo"}, "loss.name = 'ppo': must be one of cispo, grpo, dapo, policy_gradient"),
    ({"denominator": "token"}, "loss.denominator = 'token': must be one of group, batch, sample"),
    ({"anchor": "old"}, "loss.anchor = 'old': must be one of rollout, recomputed"),
    ({"low": -0.1}, "loss.low = -0.1: must be between 0 and 1"), ({"low": 1.1}, "loss.low = 1.1: must be"),
    ({"low": math.nan}, "loss.low = nan: must be"),
    ({"cap": 0.2}, "loss.cap = 0.2: must be 1 or more; it is a bound of the ratio"), ({"cap": math.nan}, "loss.cap = nan: must be"),
    ({"eps_high": 4.0}, "loss.eps_high = 4.0: must be null for cispo"),
    ({"name": "policy_gradient", "eps_low": 0.2}, "loss.eps_low = 0.2: must be null for policy_gradient"),
    ({"name": "grpo", "eps_low": 1.5}, "loss.eps_low = 1.5: must be between 0 and 1"),
    ({"name": "dapo", "eps_high": -0.1}, "loss.eps_high = -0.1: must be between 0 and inf"),
    ({"kl_coef": -1.0}, "loss.kl_coef = -1.0: must be 0 or more"), ({"kl_coef": math.inf}, "loss.kl_coef = inf: must be"),
])
def test_wrong_configuration_is_refused(wrong, message):
    with pytest.raises(ValueError) as refusal:
        PolicyLossConfig(**wrong)
    assert str(refusal.value).startswith(message)


def test_kl_needs_a_reference_and_only_kl_does():
    one, unknown = tensor(-1.0, -1.0), tensor(-1.0, math.nan)
    for reference in (None, unknown):
        with pytest.raises(ValueError, match=r"^loss.kl_coef = 0.1: needs reference_logprobs for every trained token"):
            coefficients(PolicyLossConfig(kl_coef=0.1), one, one, one, reference)
        assert coefficients(PolicyLossConfig(), one, one, one, reference)[1].tolist() == [1.0, 1.0]


# ---- what a pair counts --------------------------------------------------------------------------------------------------------------


def step_loss(denominator: str, losses: list[list[float]], weights: list[float], groups: list[str]) -> float:
    """The step's loss, group by group, sample by sample, token by token."""
    if denominator == "batch":
        above = below = 0.0
        for tokens, weight in zip(losses, weights, strict=True):
            for loss in tokens:
                above, below = above + weight * loss, below + weight
        return above / below
    means = []
    for group in sorted(set(groups)):
        above = below = 0.0
        for tokens, weight, name in zip(losses, weights, groups, strict=True):
            if name != group or not tokens:
                continue
            if denominator == "sample":
                above, below = above + weight * sum(tokens) / len(tokens), below + weight
            else:
                for loss in tokens:
                    above, below = above + weight * loss, below + weight
        if below:
            means.append(above / below)
    return sum(means) / len(means)


samples = st.lists(st.tuples(st.lists(st.floats(-9, 9), max_size=6), st.floats(0.1, 7), st.sampled_from("abcd")), min_size=1, max_size=9)


@pytest.mark.parametrize("denominator", ["group", "batch", "sample"])
@given(samples=samples)
def test_scales_are_the_formulas(denominator, samples):
    losses, weights, groups = (list(column) for column in zip(*samples, strict=True))
    lengths = np.array([len(tokens) for tokens in losses])
    assume(lengths.any())
    scale = scales(PolicyLossConfig(denominator=denominator), lengths, np.array(weights), groups)
    assert scale.dtype == np.float64
    assert sum(s * sum(tokens) for s, tokens in zip(scale, losses, strict=True)) == pytest.approx(
        step_loss(denominator, losses, weights, groups), rel=1e-12, abs=1e-12)
    assert (scale * lengths).sum() == pytest.approx(1, rel=1e-12)
    assert (scale[lengths == 0] == 0).all()


@pytest.mark.parametrize("denominator", ["group", "batch", "sample"])
def test_a_weight_of_two_is_the_sample_twice(denominator):
    config = PolicyLossConfig(denominator=denominator)
    weighed = scales(config, np.array([3, 5, 2]), np.array([2.0, 1.0, 1.0]), ["a", "a", "b"])
    twice = scales(config, np.array([3, 3, 5, 2]), np.ones(4), ["a", "a", "a", "b"])
    assert weighed == pytest.approx([twice[0] + twice[1], twice[2], twice[3]], rel=1e-14)


def test_scales_by_hand():
    """Group a: samples of 1 and 3 tokens, weights 1 and 2; group b: one of 4 tokens, weight 5; group c trains nothing."""
    lengths, weights, groups = np.array([1, 4, 3, 0]), np.array([1.0, 5.0, 2.0, math.nan]), ["a", "b", "a", "c"]
    assert scales(PolicyLossConfig(denominator="group"), lengths, weights, groups) == pytest.approx([1 / 14, 1 / 8, 2 / 14, 0], rel=1e-15)
    assert scales(PolicyLossConfig(denominator="batch"), lengths, weights, groups) == pytest.approx([1 / 27, 5 / 27, 2 / 27, 0], rel=1e-15)
    assert scales(PolicyLossConfig(denominator="sample"), lengths, np.array([1.0, 5.0, 2.0, 1.0]), groups) == pytest.approx(
        [1 / 6, 1 / 8, 1 / 9, 0], rel=1e-15)


@pytest.mark.parametrize(("lengths", "weights", "groups", "message"), [
    ([1, 2], [1.0, 1.0], ["a"], "groups: 1 of them, but 2 lengths and 2 weights"),
    ([0, 0], [1.0, 1.0], ["a", "b"], "lengths: no trained token in the whole step"), ([], [], [], "lengths: no trained token"),
    ([1, 2], [1.0, 0.0], ["a", "b"], "weight[1] = 0.0: must be above 0"), ([1, 2], [math.inf, 1.0], ["a", "b"], "weight[0] = inf"),
])
def test_wrong_scales_are_refused(lengths, weights, groups, message):
    with pytest.raises(ValueError) as refusal:
        scales(PolicyLossConfig(), np.array(lengths), np.array(weights), groups)
    assert str(refusal.value).startswith(message)


# ---- metrics -------------------------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    """Ratios 1/2, 1, 2, 4; the second and third pair are of the present weights (version 7), the fourth's are not known."""
    metrics = PairMetrics()
    old = tensor(-1.0, -2.0, -3.0, -4.0)
    logprobs = old + tensor(-LN2, 0, LN2, 2 * LN2)
    reference = tensor(math.nan, math.nan, -3.0, math.nan)  # half as likely as the policy has it
    metrics.add(logprobs, old, torch.tensor([False, False, False, True]), torch.tensor([3, 7, 7, -1]), reference)
    expected = {"policy/clipped_fraction": 0.25, "policy/kl_old": ((0.5 - 1 + LN2) + 0 + (2 - 1 - LN2) + (4 - 1 - 2 * LN2)) / 4,
                "policy/kl_reference": 0.5 - 1 + LN2, "policy/logprob_gap_mean_abs": LN2 / 2, "policy/logprob_gap_max_abs": LN2,
                "policy/logprob_gap_all_mean_abs": LN2, "policy/logprob_gap_all_max_abs": 2 * LN2, "policy/staleness_mean": 4 / 3,
                "policy/staleness_max": 4, "policy/ratio_p01": 2 ** (-1 + 0.03), "policy/ratio_p50": 2**0.5, "policy/ratio_p99": 2**1.97,
                "policy/ratio_max": 4}
    assert metrics.result(7) == pytest.approx(expected, rel=1e-12)


def test_metrics_that_no_pair_can_tell_of_are_left_out():
    assert PairMetrics().result(0) == {}
    metrics = PairMetrics()
    metrics.add(tensor(-1.0), tensor(-1.5), torch.tensor([False]), torch.tensor([-1]))
    result = metrics.result(3)
    assert not [name for name in result if "staleness" in name or "reference" in name or name.startswith("policy/logprob_gap_m")]
    assert result["policy/logprob_gap_all_max_abs"] == 0.5


def test_metrics_of_microbatches_and_ranks_are_those_of_all_pairs():
    """One rank with two microbatches, one with one, one with none; some pairs are of weights that were lost since (version 5, now 4)."""
    torch.manual_seed(1)
    logprobs, old, reference = (torch.randn(3, 30, dtype=torch.float64) - 2).unbind()
    clipped, versions = torch.rand(30) < 0.3, torch.randint(-1, 6, (30,))
    reference[::4] = math.nan
    ranks = [PairMetrics() for _ in range(3)]
    whole = PairMetrics()
    for metrics, first, last in ((ranks[0], 0, 7), (ranks[0], 7, 12), (ranks[1], 12, 30), (whole, 0, 30)):
        metrics.add(*(x[first:last] for x in (logprobs, old, clipped, versions, reference)))
    sent: list[list[torch.Tensor]] = []
    for metrics in ranks:  # what each rank sends does not hang on what it receives
        sent.append([])
        metrics.result(4, lambda values, mine=sent[-1]: mine.append(values) or values)
    assert [len(s) for s in sent] == [2, 2, 2]
    received = iter([torch.cat(column) for column in zip(*sent, strict=True)])
    expected = whole.result(4)
    assert ranks[2].result(4, lambda values: next(received)) == pytest.approx(expected, rel=1e-12)

    known = [(log_ratio, v) for log_ratio, v in zip((logprobs - old).tolist(), versions.tolist(), strict=True)]
    assert expected["policy/logprob_gap_mean_abs"] == pytest.approx(np.mean([abs(x) for x, v in known if v == 4]), rel=1e-12)
    assert expected["policy/staleness_mean"] == pytest.approx(np.mean([4 - v for _, v in known if v >= 0]), rel=1e-12)
    assert expected["policy/ratio_max"] == pytest.approx(math.exp(max(x for x, _ in known)), rel=1e-12)
    assert expected["policy/kl_old"] == pytest.approx(np.mean([math.exp(x) - 1 - x for x, _ in known]), rel=1e-12)


def test_metrics_take_fp32_that_is_part_of_a_graph():
    metrics = PairMetrics()
    metrics.add(torch.tensor([-1.0], requires_grad=True), torch.tensor([-30.0]), torch.tensor([True]), torch.tensor([0], dtype=torch.int32))
    assert metrics.result(0)["policy/ratio_max"] == pytest.approx(math.exp(20))
