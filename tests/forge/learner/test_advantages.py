"""Advantages against loops over the definitions, and cases worked out by hand."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_m2.forge.learner.advantages import AdvantageConfig, group_advantages, over_tokens, reward_to_go


def by_definition(config: AdvantageConfig, episodes: list[list[float]]) -> list[list[float]]:
    to_go = [[sum(config.gamma ** (u - t) * rewards[u] for u in range(t, len(rewards))) for t in range(len(rewards))]
             for rewards in episodes]
    advantages = []
    for own in to_go:
        advantages.append([])
        for t, value in enumerate(own):
            if config.baseline == "group_return":
                averaged = spread = [other[0] for other in to_go]
            elif config.baseline == "group_step":
                averaged = spread = [other[t] for other in to_go if len(other) > t]
            else:
                averaged, spread = own, [x for other in to_go for x in other]
            advantage = value - sum(averaged) / len(averaged)
            if config.normalise_std and len(spread) > 1 and statistics.stdev(spread) > 1e-6:
                advantage /= statistics.stdev(spread) + 1e-6
            advantages[-1].append(advantage)
    return advantages


# whole numbers and halves: standard deviations are 0 or well away from it
groups = st.lists(st.lists(st.integers(-8, 8).map(lambda x: x / 2), min_size=1, max_size=6), min_size=1, max_size=6)


@pytest.mark.parametrize("normalise_std", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("baseline", ["group_return", "group_step", "episode"])
@given(group=groups)
def test_advantages_are_the_definitions(baseline, gamma, normalise_std, group):
    config = AdvantageConfig(baseline, gamma, normalise_std)
    actual = group_advantages(config, "task", {str(i): rewards for i, rewards in enumerate(group)})
    assert list(actual) == [str(i) for i in range(len(group))]
    for advantages, expected in zip(actual.values(), by_definition(config, group), strict=True):
        assert advantages.dtype == np.float64
        assert advantages.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_reward_to_go_by_hand():
    assert reward_to_go([1, 2, 4], 0.5).tolist() == [1 + 1 + 1, 2 + 2, 4]
    assert reward_to_go([1, 2, 4], 1).tolist() == [7, 6, 4]
    assert reward_to_go([1, 2, 4], 0).tolist() == [1, 2, 4]


def test_reward_to_go_leaves_its_input():
    rewards = np.array([1.0, 1.0])
    reward_to_go(rewards, 1.0)
    assert rewards.tolist() == [1, 1]


EPISODES = {"long": [1.0, 0.0, 4.0], "short": [0.0, 2.0], "one": [3.0]}  # to go: 5 4 4; 2 2; 3


def test_group_return_by_hand():
    """Baseline (5 + 2 + 3) / 3; sample variance of 5, 2, 3: (25 + 16 + 1) / 9 / 2 = 7 / 3."""
    actual = group_advantages(AdvantageConfig(), "task", EPISODES)
    assert actual["long"] == pytest.approx([5 / 3, 2 / 3, 2 / 3])
    assert actual["short"] == pytest.approx([-4 / 3, -4 / 3])
    assert actual["one"] == pytest.approx([-1 / 3])
    divided = group_advantages(AdvantageConfig(normalise_std=True), "task", EPISODES)
    assert divided["one"] == pytest.approx([-1 / 3 / (math.sqrt(7 / 3) + 1e-6)], rel=1e-12)


def test_group_step_by_hand():
    """Step 0: 5, 2, 3; step 1: 4, 2; step 2: only 4, of which the baseline is all."""
    actual = group_advantages(AdvantageConfig("group_step"), "task", EPISODES)
    assert actual["long"] == pytest.approx([5 / 3, 1, 0])
    assert actual["short"] == pytest.approx([-4 / 3, -1])
    assert actual["one"] == pytest.approx([-1 / 3])
    divided = group_advantages(AdvantageConfig("group_step", normalise_std=True), "task", EPISODES)
    assert divided["long"][1:] == pytest.approx([1 / (math.sqrt(2) + 1e-6), 0], rel=1e-12)


def test_episode_by_hand():
    """All rewards-to-go 5, 4, 4, 2, 2, 3: mean 10/3, squares 74, sample variance (74 - 6 * 100/9) / 5 = 22/15."""
    actual = group_advantages(AdvantageConfig("episode"), "task", EPISODES)
    assert actual["long"] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert actual["short"] == pytest.approx([0, 0])
    assert actual["one"] == pytest.approx([0])
    divided = group_advantages(AdvantageConfig("episode", normalise_std=True), "task", EPISODES)
    assert divided["long"][0] == pytest.approx(2 / 3 / (math.sqrt(22 / 15) + 1e-6), rel=1e-12)


def test_grpo_by_hand():
    """One reward per answer, 1 0 0 1: mean 1/2, sample std sqrt(1/3)."""
    actual = group_advantages(AdvantageConfig(normalise_std=True), "task", {"a": [1.0], "b": [0.0], "c": [0.0], "d": [1.0]})
    size = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert [x.item() for x in actual.values()] == pytest.approx([size, -size, -size, size], rel=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("episodes", [{"a": [0.1, 0.2]}, {"a": [0.1, 0.2], "b": [0.1, 0.2]}, {"a": [0.1, 0.2], "b": [0.3]}])
def test_returns_without_spread_divide_nothing(episodes):
    """0.1 + 0.2 is 0.3 but for rounding: to divide by that would blow up what differs within an episode."""
    actual = group_advantages(AdvantageConfig(normalise_std=True), "task", episodes)
    assert actual["a"] == pytest.approx([0, -0.1], abs=1e-12)


def test_advantages_of_tokens():
    tokens = over_tokens(0.1, np.array([False, True, True, False]))
    assert tokens.dtype == np.float32
    assert tokens.tolist() == [0, np.float32(0.1), np.float32(0.1), 0]


@pytest.mark.parametrize(("wrong", "message"), [
    ({"baseline": "critic"}, "advantages.baseline = 'critic': must be one of group_return, group_step, episode"),
    ({"gamma": 1.01}, "advantages.gamma = 1.01: must be between 0 and 1"), ({"gamma": -0.1}, "advantages.gamma = -0.1: must be"),
    ({"gamma": math.nan}, "advantages.gamma = nan: must be"),
])
def test_wrong_configuration_is_refused(wrong, message):
    with pytest.raises(ValueError) as refusal:
        AdvantageConfig(**wrong)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(("episodes", "message"), [
    ({}, "group 'task': no episodes"), ({"a": [1.0], "b": []}, "group 'task', episode 'b': rewards of shape [0], need one per step"),
    ({"a": [[1.0]]}, "group 'task', episode 'a': rewards of shape [1, 1]"),
    ({"a": [1.0], "b": [0.0, math.nan]}, "group 'task', episode 'b': reward of step 1 is nan, need a finite number"),
    ({"a": [-math.inf]}, "group 'task', episode 'a': reward of step 0 is -inf"),
])
def test_wrong_rewards_are_refused(episodes, message):
    with pytest.raises(ValueError) as refusal:
        group_advantages(AdvantageConfig(), "task", episodes)
    assert str(refusal.value).startswith(message)
