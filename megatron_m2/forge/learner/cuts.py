"""Cuts a line of samples in depth-first order into runs of consecutive ones, each a microbatch.

Neighbours share the longest prefixes, so a run computes few tokens twice, and a cut costs what the samples on its two sides share: nothing
between trees, little behind a common system prompt, most inside a group. A sample whose path the next one goes on from costs nothing
beside that one and a whole path anywhere else, so the two are never parted: what can be parted is called a leaf.

A run of leaves holds what its first shares with the leaf before it, plus what each adds to the one before it. That goes for tokens, for
visible pairs and for trained tokens, hence for all that is linear in them; and it only grows with the run, so that taking as much as fits
from the left needs the fewest runs.

Which samples are neighbours depends on the order of each token's children, which is free: several depth-first orders are tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

# Shape suffixes: T tokens of the forest, L leaves, C places where a cut may be (both ends included), E numbers of runs, R runs,
# 3 (tokens, pairs, trained tokens).

_SLACK = 0.01  # of the time, given away for fewer repeated tokens and for fewer idle ranks
_MANY = 512  # of more leaves, not every place is tried: the cheapest cut of each 1/64 of a run is
_ORDERS = 64  # tried where leaves are few, so that a microbatch is coarse; of n leaves 2^15 / n at most
_ROUNDING = 1 + 1e-9

Weights = tuple[float, float, float]  # of tokens, pairs and trained tokens


def weighed(weights: Weights, counts_3N: np.ndarray) -> np.ndarray:
    """float64 [N]. Not by BLAS, whose rounding differs from machine to machine: all ranks must come to the same plan."""
    return weights[0] * counts_3N[0] + weights[1] * counts_3N[1] + weights[2] * counts_3N[2]


@dataclass(frozen=True)
class Line:
    """L leaves in depth-first order.

    Attributes:
        shared_3L: int64, what a leaf's path has in common with the path of the leaf before it; 0 for the first.
        upto_3L: int64 [3, L + 1], sum over the leaves before of what they add to that.
    """

    shared_3L: np.ndarray
    upto_3L: np.ndarray

    @classmethod
    def of(cls, path_3L: np.ndarray, shared_3L: np.ndarray) -> Line:
        return cls(shared_3L, np.cumsum(np.pad(path_3L - shared_3L, ((0, 0), (1, 0))), axis=1))

    def __len__(self) -> int:
        return self.shared_3L.shape[1]

    @property
    def path_3L(self) -> np.ndarray:
        """Of each leaf alone."""
        return self.shared_3L + np.diff(self.upto_3L)

    def cost(self, weights: Weights) -> np.ndarray:
        """float64 [L]: of each leaf alone."""
        return weighed(weights, self.path_3L)

    def held(self, cuts: np.ndarray) -> np.ndarray:
        """int64 [3, R]: what the runs between ``cuts``, from 0 to L, hold."""
        return self.shared_3L[:, cuts[:-1]] + self.upto_3L[:, cuts[1:]] - self.upto_3L[:, cuts[:-1]]

    def weigh(self, weights: Weights) -> tuple[np.ndarray, np.ndarray]:
        """float64 [L] and [L + 1]: the leaves a to b - 1 weigh the first's a plus the second's b."""
        upto = weighed(weights, self.upto_3L)
        return weighed(weights, self.shared_3L) - upto[:-1], upto

    def shuffled(self, leaf: int, random: np.random.Generator) -> tuple[Line, np.ndarray]:
        """Another depth-first order: children change places at the token where ``leaf``, not the first, parts from the one before.

        Returns:
            The line in that order, and int64 [L], where in this one its leaves are.
        """
        shared = self.shared_3L[0]
        above = np.flatnonzero(shared < shared[leaf])  # leaves before which a path parts higher up
        right = np.searchsorted(above, leaf)
        start, stop = above[right - 1] if right else 0, above[right] if right < len(above) else len(self)
        children = np.split(np.arange(start, stop), 1 + np.flatnonzero(shared[start + 1:stop] == shared[leaf]))
        children = [children[i] for i in random.permutation(len(children))]
        order = np.concatenate([np.arange(start), *children, np.arange(stop, len(self))])
        shared_3L = self.shared_3L[:, order]
        shared_3L[:, start + np.cumsum([0, *map(len, children[:-1])])] = self.shared_3L[:, [leaf]]
        shared_3L[:, start] = self.shared_3L[:, start]
        return Line.of(self.path_3L[:, order], shared_3L), order


class Paths:
    """Measures paths of a forest, given as in :class:`megatron_m2.forest.TokenForest`, with the bool [T] of its trained tokens."""

    def __init__(self, depth_T: np.ndarray, subtree_end_T: np.ndarray, trained_T: np.ndarray) -> None:
        left_T = np.bincount(subtree_end_T[trained_T], minlength=len(depth_T) + 1)[:-1]  # trained tokens whose subtree ends there
        self._depth_T, self._trained_T = depth_T, trained_T
        self._above_T = np.cumsum(trained_T) - np.cumsum(left_T)  # trained tokens of the path to here
        self._key_T = (depth_T.astype(np.int64) << 32) | np.arange(len(depth_T))

    def line(self, last_L: np.ndarray) -> Line:
        """Of the paths that end at ``last_L``, ascending, none on the way to another."""
        tokens = self._depth_T[last_L].astype(np.int64) + 1
        path_3L = np.stack([tokens, tokens * (tokens + 1) // 2, self._above_T[last_L]])
        shared_3L = np.zeros_like(path_3L)
        if len(last_L) > 1:
            # The shallowest token after one leaf, up to the next, is where the next's path leaves: its depth is what they share.
            fork = np.minimum.reduceat(self._key_T[:last_L[-1] + 1], last_L[:-1] + 1)
            tokens, at = fork >> 32, fork & (2**32 - 1)
            shared_3L[:, 1:] = tokens, tokens * (tokens + 1) // 2, self._above_T[at] - self._trained_T[at]
        return Line.of(path_3L, shared_3L)


def over_limits(line: Line, limits: Sequence[tuple[Weights, float]]) -> np.ndarray:
    """bool [L]: leaves that exceed a limit alone."""
    return np.logical_or.reduce([line.cost(weights) > limit * _ROUNDING for weights, limit in limits])


def lockstep(costs: np.ndarray, ranks: int) -> np.ndarray:
    """Of costs [R], or of each column of [R, E]: their time on ranks that wait for each other after every round of like ones."""
    return -np.sort(-costs, axis=0)[::ranks].sum(0)


def best_split(line: Line, limits: Sequence[tuple[Weights, float]], weights: Weights, ranks: int) -> tuple[Line, np.ndarray, np.ndarray]:
    """:func:`split` of several depth-first orders, each the best so far with the children of one to three tokens shuffled.

    Taken is what needs the fewest rounds, and of that the least lockstep time times tokens.

    Returns:
        The line in the order taken, the places int64 [L] of its leaves in the line given, and the cuts.
    """
    order_L, random = np.arange(len(line)), np.random.default_rng(0)
    if not len(line):
        return line, order_L, np.zeros(1, dtype=np.int64)
    even = max(float(line.cost(weights).max()), float(weighed(weights, line.upto_3L[:, -1])) / ranks)
    ideal = even * float(line.upto_3L[0, -1])
    taken, least = (line, order_L, split(line, limits, weights, ranks)), (inf, inf)
    for attempt in range(max(1, min(_ORDERS, 2**15 // len(line)))):
        line, order_L, cuts = taken
        if attempt:
            for _ in range(random.integers(1, 4)):
                line, moved = line.shuffled(int(random.integers(1, len(line))), random)
                order_L = order_L[moved]
            cuts = split(line, limits, weights, ranks)
        held_3R = line.held(cuts)
        score = (-(-held_3R.shape[1] // ranks), float(lockstep(weighed(weights, held_3R), ranks)) * float(held_3R[0].sum()))
        if score < least:
            taken, least = (line, order_L, cuts), score
        if score[1] <= (1 + _SLACK) * ideal:
            break
    return taken


def split(line: Line, limits: Sequence[tuple[Weights, float]], weights: Weights, ranks: int) -> np.ndarray:
    """Cuts from 0 to L, int64 [R + 1]: R runs within the limits, at most ``ranks`` times the fewest rounds that these allow.

    The largest run's cost is within 1 % of the least that so many runs can have. Each number of runs is then considered with its
    fewest repeated tokens, and of ways with equally many with the evenest (least sum of squared costs). Of these the one with the most
    runs is taken whose lockstep time, times its tokens, is within 1 % of the least.

    Args:
        line: at least one leaf.
        limits: weights and what the weighted sum over a run must not exceed; no leaf does alone.
        weights: of a run's cost.
    """
    reach_L = np.minimum.reduce([_reach(*line.weigh(w), limit) for w, limit in limits])
    first_L, upto_L = line.weigh(weights)
    cuts = _greedy(reach_L)
    most = min(-(-(len(cuts) - 1) // ranks) * ranks, len(line))
    cuts = _evened(first_L, upto_L, reach_L, cuts, most)
    cap = (1 + _SLACK) * float((first_L[cuts[:-1]] + upto_L[cuts[1:]]).max())
    reach_L = np.minimum(reach_L, _reach(first_L, upto_L, cap))

    place_C = _places(line, upto_L, min(cap / 64, float(upto_L[-1]) / (2 * most)), cuts)
    start = place_C[:-1]
    reach_C = np.searchsorted(place_C, reach_L[start], "right") - 1
    first_C, upto_C = np.append(first_L[start], 0.0), upto_L[place_C]
    price_C = np.append(line.shared_3L[0, start], 0)
    repeated_E, cuts_RE = _fewest_repeats(reach_C, price_C, first_C / cap, upto_C / cap, most)
    costs = first_C[cuts_RE[1:]] + upto_C[cuts_RE[:-1]]  # unused rows are runs from 0 to 0 and cost nothing
    score_E = lockstep(costs, ranks) * (line.upto_3L[0, -1] + repeated_E)
    chosen = np.flatnonzero(score_E <= (1 + _SLACK) * score_E.min())[-1]
    return place_C[np.unique(cuts_RE[:, chosen])]


def _reach(first_L: np.ndarray, upto_L: np.ndarray, limit: float) -> np.ndarray:
    """int64 [L]: one past the last leaf of the longest run from each leaf that weighs at most ``limit``."""
    reach = np.searchsorted(upto_L, limit * _ROUNDING - first_L, "right") - 1
    return np.maximum.accumulate(reach)  # where rounding would say that a part of a run weighs more than the run


def _greedy(reach_L: np.ndarray) -> np.ndarray:
    """The fewest runs: each as long as it may be."""
    reach = reach_L.tolist()
    cuts = [0]
    while cuts[-1] < len(reach):
        assert reach[cuts[-1]] > cuts[-1], f"leaf {cuts[-1]} exceeds a limit alone"
        cuts.append(reach[cuts[-1]])
    return np.array(cuts)


def _evened(first_L: np.ndarray, upto_L: np.ndarray, reach_L: np.ndarray, cuts: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` runs whose largest cost is the least there is (to 1e-6), from ``cuts`` that are few enough: by bisection."""
    high = float((first_L[cuts[:-1]] + upto_L[cuts[1:]]).max())
    low = cap = max(float((first_L + upto_L[1:]).max()), float(upto_L[-1]) / most)  # no cap under it will do
    while high > low * (1 + 1e-6):
        trial = _greedy(np.minimum(reach_L, _reach(first_L, upto_L, cap)))
        if len(trial) - 1 <= most:
            cuts, high = trial, float((first_L[trial[:-1]] + upto_L[trial[1:]]).max())
        else:
            low = cap
        cap = (low + high) / 2
    return cuts


def _places(line: Line, upto_L: np.ndarray, width: float, cuts: np.ndarray) -> np.ndarray:
    """int64 [C]: where cuts are tried, ascending, from 0 to L: of many the cheapest in every ``width`` of cost, and ``cuts``, so that
    a way within the cap exists."""
    if len(line) <= _MANY:
        return np.arange(len(line) + 1)
    bucket = np.floor(upto_L[1:-1] / width).astype(np.int64)
    order = np.lexsort((line.shared_3L[0, 1:], bucket))
    cheapest = order[np.flatnonzero(np.diff(bucket[order], prepend=-1))]
    return np.unique(np.concatenate([cuts, cheapest + 1]))


def _fewest_repeats(reach_C: np.ndarray, price_C: np.ndarray, first_C: np.ndarray, upto_C: np.ndarray, most: int
                    ) -> tuple[np.ndarray, np.ndarray]:
    """For each number of runs from the fewest to ``most`` the cheapest cuts, and of equally cheap ones the evenest.

    A state of the dynamic program is a place and by how many its runs so far exceed the fewest that get there; of the latter a run
    adds one or none. Only as many states exist as there are runs to spare.

    Args:
        reach_C: int64 [C - 1], last place to which a run from each may go.
        price_C: int64, tokens that a cut there repeats. first_C, upto_C: cost of a run as :meth:`Line.weigh` has it, over the cap.

    Returns:
        int64 [E] repeated tokens, and int64 [R + 1, E], places of the cuts from the last to the first, then 0.
    """
    places = len(price_C)
    since_C = np.searchsorted(reach_C, np.arange(places))  # first place from where a run may come here
    fewest = [0] * places
    for c in range(1, places):
        fewest[c] = fewest[since_C[c]] + 1
    fewest_C = np.array(fewest)
    spare = most - fewest[-1] + 1
    turn_C = np.searchsorted(fewest_C, fewest_C)  # from there on a run to here starts with as many runs as come here at best

    least_CE = np.full((places, spare), np.inf)
    least_CE[0, 0] = 0
    came_CE = np.zeros((places, spare), dtype=np.int32)
    for c in range(1, places):
        since, turn = since_C[c], turn_C[c]
        # the squares sum to less than one token
        step = price_C[since:c] + (first_C[since:c] + upto_C[c]) ** 2 / (2 * most)
        ways = least_CE[since:c] + step[:, None]
        if turn < c:
            ways[turn - since:, 1:] = ways[turn - since:, :-1]
            ways[turn - since:, 0] = np.inf
        best = ways.argmin(0)
        came_CE[c] = since + best
        least_CE[c] = ways[best, np.arange(spare)]

    over = np.flatnonzero(np.isfinite(least_CE[-1]))
    repeated_E = np.floor(least_CE[-1, over]).astype(np.int64)
    at = np.full(len(over), places - 1)
    rows = [at]
    while at.any():
        before = came_CE[at, over]
        over = np.where(fewest_C[before] == fewest_C[at], np.maximum(over - 1, 0), over)
        at = before
        rows.append(at)
    return repeated_E, np.stack(rows)
