"""Advantages from rewards: what is still to come after a step, less a baseline (MiniMax-M2 report eq. 2-7).

An episode is a list of steps, each one completion of the policy. A step's reward is the sum of all that it earned, the last one's with the
reward of the outcome. A group is the episodes of one task. The report leaves the baseline B_i open: here are three readings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Added to a standard deviation before dividing by it, as in verl (TRL: 1e-4). One that is not above this is rounding.
EPSILON = 1e-6


@dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages.

    Attributes:
        baseline: what is subtracted from the reward-to-go of step t of an episode.
            "group_return": the mean over the group's episodes of their whole return, which is the reward-to-go of step 0. With one reward
            at the end and gamma 1 it is GRPO's.
            "group_step": the mean of the reward-to-go of step t over those episodes of the group that have a step t.
            "episode": the mean of the episode's own rewards-to-go over its steps.
        gamma: discount from one step to the next.
        normalise_std: divide by the standard deviation over the group: of the returns ("group_return"), of the rewards-to-go of step t
            ("group_step"), or of all rewards-to-go ("episode"). It is that of a sample, n - 1 below, as in verl and TRL, plus 1e-6. Where
            it is not above 1e-6 (one value, or all the same) nothing is divided: there is no scale to divide by.

    Raises:
        ValueError: naming the field, its value and what is legal.
    """

    baseline: str = "group_return"
    gamma: float = 1.0
    normalise_std: bool = False

    def __post_init__(self) -> None:
        if self.baseline not in ("group_return", "group_step", "episode"):
            raise ValueError(f"advantages.baseline = {self.baseline!r}: must be one of group_return, group_step, episode")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"advantages.gamma = {self.gamma}: must be between 0 and 1")


def reward_to_go(rewards: Sequence[float] | np.ndarray, gamma: float) -> np.ndarray:
    """fp64 [steps]: sum over u >= t of ``gamma^(u - t) rewards[u]`` (report eq. 6)."""
    to_go = np.array(rewards, dtype=np.float64)
    for t in range(len(to_go) - 2, -1, -1):
        to_go[t] += gamma * to_go[t + 1]
    return to_go


def group_advantages(config: AdvantageConfig, group: str, episodes: Mapping[str, Sequence[float] | np.ndarray]) -> dict[str, np.ndarray]:
    """Advantages of every step of a group's episodes.

    Args:
        group: its name, for messages.
        episodes: by name, the reward of each step.

    Returns:
        By name, fp64 [steps].

    Raises:
        ValueError: a group without episodes, an episode without steps, or a reward that is no finite number; naming the group, episode
            and step.
    """
    if not episodes:
        raise ValueError(f"group {group!r}: no episodes, need at least one")
    for name, rewards in episodes.items():
        _check(group, name, rewards)
    to_go = {name: reward_to_go(rewards, config.gamma) for name, rewards in episodes.items()}
    if config.baseline == "group_return":
        returns = np.array([values[0] for values in to_go.values()])
        return {name: _divided(config, values - returns.mean(), returns) for name, values in to_go.items()}
    if config.baseline == "episode":
        everything = np.concatenate(list(to_go.values()))
        return {name: _divided(config, values - values.mean(), everything) for name, values in to_go.items()}
    advantages = {name: np.empty_like(values) for name, values in to_go.items()}
    for t in range(max(len(values) for values in to_go.values())):
        there = {name: values[t] for name, values in to_go.items() if len(values) > t}
        at_t = np.array(list(there.values()))
        for name, value in zip(there, _divided(config, at_t - at_t.mean(), at_t), strict=True):
            advantages[name][t] = value
    return advantages


def over_tokens(advantage: float, trainable: np.ndarray) -> np.ndarray:
    """A step's advantage at each of its trained tokens, as a ``Sample`` has them: fp32 [n], 0 elsewhere. ``trainable``: bool [n]."""
    return np.where(trainable, np.float32(advantage), np.float32(0))


def _divided(config: AdvantageConfig, centred: np.ndarray, population: np.ndarray) -> np.ndarray:
    std = population.std(ddof=1) if config.normalise_std and len(population) > 1 else 0.0
    return centred / (std + EPSILON) if std > EPSILON else centred


def _check(group: str, name: str, rewards: Sequence[float] | np.ndarray) -> None:
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"group {group!r}, episode {name!r}: rewards of shape {list(values.shape)}, need one per step, at least one")
    if (wrong := ~np.isfinite(values)).any():
        t = int(np.argmax(wrong))
        raise ValueError(f"group {group!r}, episode {name!r}: reward of step {t} is {values[t]}, need a finite number")
