#!/usr/bin/env python3
"""Input tokens a second that the forest builder merges on one core, beside the same in plain Python (a dictionary at each token).

    python tools/bench/forest_builder.py [--cards results --commit $(git rev-parse HEAD)]

Prints a table and one JSON object per figure, the last line being the last figure's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package of this checkout, installed or not

import torch

from megatron_m2.forest import merge_flat, merge_samples
from megatron_m2.ops import _extension
from megatron_m2.ops.forest import merge_reference
from tools.bench.common import Figure, add_card_arguments, device_name, report, write_cards

VOCAB = 200_064


def answers(rng: np.random.Generator, prompt: int, count: int, length: int) -> list[np.ndarray]:
    """A group of answers to one prompt."""
    shared = rng.integers(0, VOCAB, prompt)
    return [np.concatenate([shared, rng.integers(0, VOCAB, length)]) for _ in range(count)]


def episode(rng: np.random.Generator, turns: int, length: int) -> list[np.ndarray]:
    """An append-only episode, each turn stored with all that came before it."""
    whole = rng.integers(0, VOCAB, turns * length)
    return [whole[: (turn + 1) * length] for turn in range(turns)]


def rewrites(rng: np.random.Generator, count: int, vocab: int, longest: int) -> list[np.ndarray]:
    """Each goes on from a random cut of an earlier one."""
    samples = [rng.integers(0, vocab, longest)]
    for _ in range(count - 1):
        other = samples[rng.integers(len(samples))]
        samples.append(np.concatenate([other[: rng.integers(len(other))], rng.integers(0, vocab, rng.integers(1, longest))]))
    return samples


def cases(rng: np.random.Generator) -> dict[str, list[np.ndarray]]:
    return {
        "16 answers of 256 to a prompt of 2048, 8 groups": [s for _ in range(8) for s in answers(rng, 2048, 16, 256)],
        "80 turns of 512, each with all before it": episode(rng, 80, 512),
        "128 branches of 32 on 4096": answers(rng, 4096, 128, 32),
        "4000 with random cuts of each other": rewrites(rng, 4000, VOCAB, 512),
        "1000 documents of 1024, nothing shared": [rng.integers(0, VOCAB, 1024) for _ in range(1000)],
        "100,000 of up to 20 out of 8 ids": [rng.integers(0, 8, n) for n in rng.integers(1, 21, 100_000)],
    }


def seconds(work: Callable[[], object], calls: int) -> float:
    """Median of single calls."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_card_arguments(parser)
    a = parser.parse_args()
    if not _extension.available():
        raise SystemExit("no C++ builder: the bench would time the reference against itself")
    torch.set_num_threads(1)
    device, figures = device_name(torch.device("cpu")), []
    for name, samples in cases(np.random.default_rng(0)).items():
        tokens = np.concatenate(samples).astype(np.int64)
        lengths = np.array([len(s) for s in samples], dtype=np.int64)
        weights = np.ones(len(tokens), dtype=np.float32)
        plain = seconds(partial(merge_reference, tokens, lengths), 1)
        each = [weights[: len(s)] for s in samples]
        works: dict[str, Callable[[], object]] = {
            "flat": partial(merge_flat, tokens, lengths), "flat, weighed": partial(merge_flat, tokens, lengths, weights),
            "arrays, weighed": partial(merge_samples, samples, each)}
        per_million = 1e12 / len(tokens)  # in us: of what is measured the less is the better
        for form, work in works.items():
            figures.append(Figure("forest_builder", f"{name}: {form}", per_million * seconds(work, 15), per_million * plain, 0, device,
                                  "<= 33333: 30 M tokens/s", "us/M"))
    report(figures)
    if a.cards:
        write_cards(figures, a.cards, a.commit)


if __name__ == "__main__":
    main()
