"""Runs of samples against brute force over every way to cut, with tokens counted as sets."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_m2.forest import TokenForest, merge_samples
from megatron_m2.forge.learner import cuts
from megatron_m2.forge.learner.cuts import Line, Paths, best_split, over_limits, split
from tests.conftest import random_samples

TOKENS = LINEAR = (1.0, 0.0, 0.0)  # weights of a token budget and of costs
PLAIN = (4.0, 1.0, 2.0)
CASES = st.tuples(st.integers(0, 10**6), st.integers(1, 14), st.integers(1, 4), st.integers(1, 4), st.integers(0, 30))


class Case:
    """A small forest with its samples in depth-first order: ``paths[s]`` is the set of tokens on the way to sample s."""

    def __init__(self, samples: list[list[int]], seed: int = 0) -> None:
        self.forest: TokenForest
        self.forest, places = merge_samples(samples)
        self.trained = np.random.default_rng(seed).random(len(self.forest)) < 0.5
        self.paths = [set(place.tolist()) for place in sorted(places, key=lambda place: place[-1])]
        self.leaves = [a for a, b in pairwise(self.paths) if not a <= b] + self.paths[-1:]

    def line(self) -> Line:
        depth, end = self.forest.depth.numpy(), self.forest.subtree_end.numpy()
        return Paths(depth, end, self.trained).line(np.array([max(leaf) for leaf in self.leaves]))

    def counts(self, paths: list[set[int]]) -> np.ndarray:
        held = sorted(set().union(*paths))
        depth = self.forest.depth.numpy()[held].astype(np.int64)
        return np.array([len(held), (depth + 1).sum(), self.trained[held].sum()])

    def ways(self, paths: list[set[int]], budget: int, most: int) -> list[list[np.ndarray]]:
        """Counts of the runs of every way to cut ``paths`` into at most so many runs, each within the budget."""
        run = {(a, b): self.counts(paths[a:b]) for a, b in combinations(range(len(paths) + 1), 2)}
        found = []
        for number in range(min(most, len(paths))):
            for inner in combinations(range(1, len(paths)), number):
                runs = [run[bounds] for bounds in pairwise((0, *inner, len(paths)))]
                if max(run[0] for run in runs) <= budget:
                    found.append(runs)
        return found


def case_of(drawn: tuple[int, int, int, int, int]) -> tuple[Case, int, int]:
    seed, count, branching, ranks, room = drawn
    case = Case(random_samples(seed, count=count, vocab=4, length=9, branching=branching), seed)
    return case, max(map(len, case.paths)) + room, ranks


def costs(runs: list[np.ndarray]) -> np.ndarray:
    return np.array([np.dot(PLAIN, run) for run in runs])


def lockstep(runs: list[np.ndarray], ranks: int) -> float:
    ordered = sorted(costs(runs), reverse=True)
    return float(sum(ordered[i] for i in range(0, len(ordered), ranks)))


@settings(max_examples=100)
@given(CASES)
def test_split_is_what_trying_every_way_finds(drawn):
    case, budget, ranks = case_of(drawn)
    line = case.line()
    got = split(line, [(TOKENS, budget)], PLAIN, ranks)
    assert got[0] == 0
    assert got[-1] == len(case.leaves)
    assert (np.diff(got) > 0).all()
    mine = [case.counts(case.leaves[a:b]) for a, b in pairwise(got.tolist())]
    assert np.array_equal(line.held(got), np.stack(mine, axis=1))

    ways = case.ways(case.leaves, budget, len(case.leaves))
    rounds = -(-min(map(len, ways)) // ranks)
    ways = [way for way in ways if len(way) <= ranks * rounds]
    cap = 1.01 * min(costs(way).max() for way in ways) + 1e-6
    ways = [way for way in ways if costs(way).max() <= cap]
    # for each number of runs: fewest tokens, then least squares
    best = {n: min((sum(run[0] for run in way), (costs(way) ** 2).sum(), lockstep(way, ranks)) for way in ways if len(way) == n)
            for n in sorted({len(way) for way in ways})}
    score = {n: tokens * time for n, (tokens, _, time) in best.items()}
    tokens, squares, _ = best[max(n for n in score if score[n] <= 1.01 * min(score.values()))]
    assert sum(run[0] for run in mine) == tokens
    assert (costs(mine) ** 2).sum() == pytest.approx(squares)
    assert costs(mine).max() <= cap


@given(CASES)
def test_never_parting_a_sample_from_what_goes_on_from_it_loses_nothing(drawn):
    case, budget, ranks = case_of(drawn)
    case.paths = case.paths[:8]
    leaves = [a for a, b in pairwise(case.paths) if not a <= b] + case.paths[-1:]
    apart, together = (case.ways(paths, budget, len(paths)) for paths in (case.paths, leaves))
    assert min(map(len, apart)) == min(map(len, together))
    for most in range(min(map(len, together)), ranks + 1):
        assert min(costs(w).max() for w in apart if len(w) <= most) == min(costs(w).max() for w in together if len(w) <= most)
        assert min(sum(r[0] for r in w) for w in apart if len(w) <= most) == min(sum(r[0] for r in w) for w in together if len(w) <= most)


@given(CASES)
def test_a_memory_limit_counts_trained_tokens(drawn):
    case, _, ranks = case_of(drawn)
    line = case.line()
    weights = (2.0, 0.0, 3.0)
    limit = float(np.dot(weights, line.path_3L).max()) + drawn[-1]
    assert over_limits(line, [(weights, limit)]).sum() == 0
    assert over_limits(line, [(weights, limit - drawn[-1] - 1)]).any()
    got = split(line, [(TOKENS, 10**6), (weights, limit)], PLAIN, ranks)
    assert max(np.dot(weights, case.counts(case.leaves[a:b])) for a, b in pairwise(got.tolist())) <= limit


@given(CASES, st.integers(0, 5))
def test_another_depth_first_order_of_the_same_leaves(drawn, times):
    case, _, _ = case_of(drawn)
    line, order = case.line(), np.arange(len(case.leaves))
    random = np.random.default_rng(drawn[0])
    for _ in range(times if len(order) > 1 else 0):
        line, moved = line.shuffled(int(random.integers(1, len(order))), random)
        order = order[moved]
    assert sorted(order.tolist()) == list(range(len(order)))
    leaves = [case.leaves[i] for i in order]
    for i, leaf in enumerate(leaves):
        assert line.path_3L[:, i].tolist() == case.counts([leaf]).tolist()
        assert line.shared_3L[:, i].tolist() == case.counts([leaf & leaves[i - 1] if i else set()]).tolist()
    assert line.held(np.array([0, len(order)]))[:, 0].tolist() == case.counts(leaves).tolist()


def test_shuffling_reaches_every_order_of_children():
    case = Case([[0, 1, 1], [0, 1, 2], [0, 2], [5]])
    random, seen = np.random.default_rng(0), set()
    line, order = case.line(), np.arange(4)
    for _ in range(200):
        line, moved = line.shuffled(int(random.integers(1, 4)), random)
        order = order[moved]
        seen.add(tuple(order.tolist()))
    assert len(seen) == 8  # two trees, two children of the root, two of its first child


@given(CASES)
def test_the_order_taken_is_no_worse_than_the_one_given(drawn):
    case, budget, ranks = case_of(drawn)
    line, order, got = best_split(case.line(), [(TOKENS, budget)], PLAIN, ranks)
    leaves = [case.leaves[i] for i in order]
    mine = [case.counts(leaves[a:b]) for a, b in pairwise(got.tolist())]
    assert np.array_equal(line.held(got), np.stack(mine, axis=1))
    plain = [case.counts(case.leaves[a:b]) for a, b in pairwise(split(case.line(), [(TOKENS, budget)], PLAIN, ranks).tolist())]
    keys = [(-(-len(way) // ranks), lockstep(way, ranks) * sum(run[0] for run in way)) for way in (mine, plain)]
    assert keys[0][0] <= keys[1][0]
    assert keys[0][1] <= keys[1][1] or keys[0][0] < keys[1][0]


def test_reordering_evens_what_no_cut_of_the_given_order_can():
    case = Case([[1] * 6, [2] * 2, [3] * 6, [4] * 2])
    assert case.line().held(split(case.line(), [(TOKENS, 99)], LINEAR, 2))[0].tolist() == [8, 8]
    case = Case([[1] * 6, [2] * 6, [3] * 2, [4] * 2])
    assert case.line().held(split(case.line(), [(TOKENS, 99)], LINEAR, 2))[0].tolist() == [6, 10]
    line, _, got = best_split(case.line(), [(TOKENS, 99)], LINEAR, 2)
    assert line.held(got)[0].tolist() == [8, 8]


def test_of_equally_cheap_cuts_the_evenest_are_taken():
    case = Case([[1] * 10, *([token] * 2 for token in range(2, 6))])
    assert case.line().held(split(case.line(), [(TOKENS, 99)], LINEAR, 3))[0].tolist() == [10, 4, 4]
    case = Case([[token] * 7 for token in range(96)])
    assert case.line().held(split(case.line(), [(TOKENS, 10**6)], PLAIN, 8))[0].tolist() == [84] * 8


@pytest.mark.parametrize("seed", range(6))
def test_the_largest_of_many_runs_is_the_least_there_is(seed):
    lengths = np.random.default_rng(seed).integers(100, 400, 60)
    line = Case([[token] * length for token, length in enumerate(lengths.tolist())]).line()
    least = np.cumsum(lengths).astype(float)  # of the largest run, of the first so many chains
    for _ in range(19):
        least = np.array([min([least[last], *(max(least[first - 1], lengths[first:last + 1].sum()) for first in range(1, last + 1))])
                          for last in range(60)])
    assert least[-1] <= line.held(split(line, [(TOKENS, 10**6)], LINEAR, 20))[0].max() <= 1.01 * least[-1]


@pytest.mark.parametrize("seed", range(3))
def test_of_many_leaves_few_places_suffice(seed, monkeypatch):
    random = np.random.default_rng(seed)
    samples = [[group] * 20 + [*random.integers(10**3, 10**6, random.integers(1, 5))] for group in range(200) for _ in range(10)]
    case = Case(samples, seed)
    line = case.line()
    limits = [(TOKENS, 3000.0)]
    assert len(line) > 2 * cuts._MANY
    few = line.held(split(line, limits, PLAIN, 4))
    monkeypatch.setattr(cuts, "_MANY", len(line))
    every = line.held(split(line, limits, PLAIN, 4))
    assert few[0].max() <= 3000
    assert every[0].sum() == few[0].sum() == len(case.forest)
    assert few.shape == every.shape
    assert costs(list(few.T)).max() <= 1.01 * costs(list(every.T)).max()


def test_a_full_budget_leaves_no_choice_of_places():
    line = Case([[2 * i, 2 * i + 1] for i in range(2000)]).line()
    assert line.held(split(line, [(TOKENS, 200)], LINEAR, 1))[0].tolist() == [200] * 20
