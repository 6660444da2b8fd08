"""Groups of RL samples of the shapes that agents leave behind; tokens are random, what is shared is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megatron_m2.forge.learner.samples import Sample

VOCAB = 4096


def _sample(rng: np.random.Generator, number: int, context: Sequence[np.ndarray], said: np.ndarray) -> Sample:
    tokens = np.concatenate([*context, said])
    trained = np.arange(len(tokens)) >= len(tokens) - len(said)
    old = np.where(trained, -8.3 + 0.1 * rng.standard_normal(len(tokens)), 0).astype(np.float32)  # about log 1/4096
    return Sample(f"s{number}", "task", tokens, trained, old, np.where(trained, rng.standard_normal(len(tokens)), 0).astype(np.float32))


def answers(rng: np.random.Generator, prompt: int, count: int, length: int) -> list[Sample]:
    """Answers to one prompt."""
    shared = rng.integers(0, VOCAB, prompt)
    return [_sample(rng, i, [shared], rng.integers(0, VOCAB, length)) for i in range(count)]


def append_only(rng: np.random.Generator, turns: int, length: int) -> list[Sample]:
    """An episode whose every turn is a sample with all before it as its context; half of a turn is said, the rest observed."""
    context: list[np.ndarray] = [rng.integers(0, VOCAB, length // 2)]
    samples = []
    for turn in range(turns):
        said = rng.integers(0, VOCAB, length // 2)
        samples.append(_sample(rng, turn, context, said))
        context = [*context, said, rng.integers(0, VOCAB, length - length // 2)]
    return samples


def agents(rng: np.random.Generator, episodes: int, turns: int, prompt: int = 512, thinking: int = 24, action: int = 16,
           observation: int = 24) -> list[Sample]:
    """Episodes on one task. At every tenth turn a user speaks, from where on the thinking before is no longer shown; on a tenth and a
    twentieth turn a sub-agent with a short prompt of its own works for six turns."""
    samples: list[Sample] = []
    task = rng.integers(0, VOCAB, prompt)
    for _ in range(episodes):
        shown: list[np.ndarray] = [task]
        bare: list[np.ndarray] = [task]  # without thinking
        for turn in range(turns):
            if turn and turn % 10 == 0:
                user = rng.integers(0, VOCAB, observation)
                shown = bare = [*bare, user]
                samples += _sub_agent(rng, len(samples), task[: prompt // 4], 6, thinking + action, observation) if turn <= 20 else []
            thought, act, seen = (rng.integers(0, VOCAB, n) for n in (thinking, action, observation))
            samples.append(_sample(rng, len(samples), shown, np.concatenate([thought, act])))
            shown, bare = [*shown, thought, act, seen], [*bare, act, seen]
    return samples


def _sub_agent(rng: np.random.Generator, first: int, system: np.ndarray, turns: int, said: int, observation: int) -> list[Sample]:
    context: list[np.ndarray] = [system, rng.integers(0, VOCAB, 64)]
    samples = []
    for turn in range(turns):
        answer = rng.integers(0, VOCAB, said)
        samples.append(_sample(rng, first + turn, context, answer))
        context = [*context, answer, rng.integers(0, VOCAB, observation)]
    return samples


WORKLOADS: dict[str, tuple[str, Callable[[np.random.Generator], list[Sample]]]] = {
    "a": ("16 answers of 256 tokens to a prompt of 2048", lambda rng: answers(rng, 2048, 16, 256)),
    "b": ("an episode of 80 turns of 64 tokens, each with all before it", lambda rng: append_only(rng, 80, 64)),
    "c": ("8 agents of 30 turns, thinking stripped at user turns, two sub-agents each", lambda rng: agents(rng, 8, 30)),
    "d": ("128 branches of 32 tokens on a context of 4096", lambda rng: answers(rng, 4096, 128, 32)),
}
