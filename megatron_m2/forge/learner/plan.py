"""Which samples go into which microbatch of which data-parallel rank.

Everything follows from the input alone, so every rank makes the same plan. How samples are cut into microbatches: :mod:`.cuts`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

import numpy as np

from megatron_m2.forge.learner.cuts import Line, Paths, Weights, best_split, over_limits, weighed
from megatron_m2.model.config import ModelConfig

# Shape suffixes: T tokens of the forest, S samples, L leaves (samples that no cut parts), R runs of leaves, 3 (tokens, pairs, trained).

_APART = 1 / 16  # streamed samples that share less of their paths are streams of their own: they have but a system prompt in common


@dataclass(frozen=True)
class Budget:
    """What a microbatch may hold.

    Attributes:
        tokens: at most so many unique tokens.
        bytes_per_token: activation memory of a unique token. bytes_per_trained: what the head adds for a trained one.
        memory_bytes: at most so much memory by that estimate.

    Raises:
        ValueError: on construction, naming the field.
    """

    tokens: int
    bytes_per_token: float = 0.0
    bytes_per_trained: float = 0.0
    memory_bytes: float = inf

    def __post_init__(self) -> None:
        if not self.tokens >= 1:
            raise ValueError(f"budget.tokens = {self.tokens}: must be at least 1")
        _refuse_negative("budget", bytes_per_token=self.bytes_per_token, bytes_per_trained=self.bytes_per_trained)
        if not self.memory_bytes > 0:
            raise ValueError(f"budget.memory_bytes = {self.memory_bytes}: must be more than 0")

    @property
    def limits(self) -> list[tuple[Weights, float]]:
        """Weights of (tokens, pairs, trained), and what their sum over a microbatch must not exceed."""
        return [((1.0, 0.0, 0.0), self.tokens), ((self.bytes_per_token, 0.0, self.bytes_per_trained), self.memory_bytes)]


@dataclass(frozen=True)
class Cost:
    """Estimated time of a microbatch, in any unit: so much per unique token, per visible (query, key) pair and per trained token.

    Raises:
        ValueError: on construction, naming the field.
    """

    per_token: float
    per_pair: float = 0.0
    per_trained: float = 0.0

    def __post_init__(self) -> None:
        _refuse_negative("cost", per_token=self.per_token, per_pair=self.per_pair, per_trained=self.per_trained)
        if self.per_token == 0:
            raise ValueError("cost.per_token = 0: must be more than 0")

    @classmethod
    def of(cls, model: ModelConfig) -> Cost:
        """FLOPs of forward and backward; MTP modules count as if they saw every token and predicted every trained one."""
        k = model.num_mtp_modules
        token = model.forward_flops(1, 0, 0, k)
        return cls(3.0 * token, 3.0 * (model.forward_flops(1, 1, 0, k) - token), 3.0 * model.forward_flops(0, 0, 1 + k))

    @property
    def weights(self) -> Weights:
        return self.per_token, self.per_pair, self.per_trained


@dataclass(frozen=True, eq=False)
class Microbatch:
    """Samples that run together; by default none.

    Attributes:
        samples: int64, their numbers, ascending.
        tokens: unique tokens. pairs: visible (query, key) pairs, self included. trained: unique tokens that some sample predicts.
        cost: estimated time.
        repeated: tokens of it that another microbatch holds too; 0 where no tree was cut.
    """

    samples: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    tokens: int = 0
    pairs: int = 0
    trained: int = 0
    cost: float = 0.0
    repeated: int = 0


@dataclass(frozen=True, eq=False)
class Plan:
    """The microbatches of one step.

    Attributes:
        ranks: per data-parallel rank its microbatches, equally many on each; those at the same place are of like cost, dearest first.
            Only at the last place may there be some without samples.
        streamed: microbatches that exceed the budget, to be computed in pieces.
        unique_tokens: of all samples, each shared one counted once.
    """

    ranks: list[list[Microbatch]]
    streamed: list[Microbatch]
    unique_tokens: int

    @property
    def rounds(self) -> int:
        """Microbatches per rank."""
        return len(self.ranks[0])

    @property
    def repeated_tokens(self) -> int:
        """Tokens computed beyond the unique ones."""
        return sum(m.tokens for mine in (*self.ranks, self.streamed) for m in mine) - self.unique_tokens

    @property
    def imbalance(self) -> float:
        """Largest cost of a rank over the mean, ``streamed`` aside; 1 is even."""
        costs = [sum(m.cost for m in mine) for mine in self.ranks]
        return max(costs) * len(costs) / sum(costs) if any(costs) else 1.0

    @property
    def lockstep_cost(self) -> float:
        """Estimated time where ranks wait for each other after every microbatch, ``streamed`` aside."""
        return sum(max(m.cost for m in at_once) for at_once in zip(*self.ranks, strict=True))


def plan(depth_T: np.ndarray, subtree_end_T: np.ndarray, last_S: np.ndarray, trained_T: np.ndarray, budget: Budget, cost: Cost, ranks: int,
         stream: bool = False) -> Plan:
    """Deals the samples of a step out to data-parallel ranks, in the fewest microbatches per rank that the budget allows.

    Microbatches are about as even as runs of samples in a depth-first order can be, and within that few tokens are in several: a
    group is cut only where the budget, the balance or an idle rank asks for it. See :func:`megatron_m2.forge.learner.cuts.best_split`.

    Args:
        depth_T, subtree_end_T: int32 [T] of the forest of all samples (:class:`megatron_m2.forest.TokenForest`).
        last_S: int64 [S], index in the forest of each sample's last token.
        trained_T: bool [T], token is predicted for the loss of some sample.
        ranks: data-parallel ranks.
        stream: samples that exceed the budget alone are handed back in ``Plan.streamed``, and with them samples that end on their path.
            Those of one tree are in one microbatch, unless they share next to nothing.

    Raises:
        ValueError: arrays that do not fit each other, no rank, or, without ``stream``, a sample that exceeds the budget alone.
    """
    _check(depth_T, subtree_end_T, last_S, trained_T, ranks)
    if len(last_S) == 0:
        return Plan([[] for _ in range(ranks)], [], 0)
    order_S = np.argsort(last_S, kind="stable")
    ends_S = last_S[order_S].astype(np.int64)
    stop_L = np.flatnonzero(np.append(subtree_end_T[ends_S[:-1]] <= ends_S[1:], True)) + 1  # behind a sample the next does not go on from
    last_L, samples_L = ends_S[stop_L - 1], np.split(order_S, stop_L[:-1])

    paths = Paths(depth_T, subtree_end_T, trained_T)
    everything = paths.line(last_L)
    over = over_limits(everything, budget.limits)
    if over.any() and not stream:
        _refuse_long(order_S[stop_L - 1], everything.path_3L, over, budget)
    kept, long = np.flatnonzero(~over), np.flatnonzero(over)
    line, order, cuts = best_split(paths.line(last_L[kept]), budget.limits, cost.weights, ranks)
    kept = kept[order]
    long_line = paths.line(last_L[long])
    long_cuts = _streamed_cuts(long_line)

    run_L = np.empty(len(last_L), dtype=np.int64)
    run_L[kept], run_L[long] = _run_of(cuts), -1 - _run_of(long_cuts)
    again_L = _held_elsewhere(everything.shared_3L[0], run_L)
    return Plan(_deal(_microbatches(line, cuts, cost, [samples_L[i] for i in kept], again_L[kept]), ranks),
                _microbatches(long_line, long_cuts, cost, [samples_L[i] for i in long], again_L[long]), int(everything.upto_3L[0, -1]))


def _streamed_cuts(line: Line) -> np.ndarray:
    """One stream per tree, where trees may have a system prompt in common."""
    tokens, shared = line.path_3L[0], line.shared_3L[0]
    apart = shared[1:] < _APART * np.minimum(tokens[:-1], tokens[1:])
    return np.unique(np.concatenate([[0], np.flatnonzero(apart) + 1, [len(line)]]))


def _run_of(cuts: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))


def _held_elsewhere(shared_L: np.ndarray, run_L: np.ndarray) -> np.ndarray:
    """int64 [L]: the first so many tokens of each leaf's path lie in another run too: what it shares with the next leaf of another run
    on either side, which is the least that neighbours on the way there share."""
    shared, run = shared_L.tolist(), run_L.tolist()
    left, right = [0] * len(run), [0] * len(run)
    for i in range(1, len(run)):
        left[i] = shared[i] if run[i] != run[i - 1] else min(shared[i], left[i - 1])
    for i in range(len(run) - 2, -1, -1):
        right[i] = shared[i + 1] if run[i] != run[i + 1] else min(shared[i + 1], right[i + 1])
    return np.maximum(left, right)


def _microbatches(line: Line, cuts: np.ndarray, cost: Cost, samples_L: list[np.ndarray], again_L: np.ndarray) -> list[Microbatch]:
    """One per run; ``again_L`` as :func:`_held_elsewhere` returns it."""
    held_3R = line.held(cuts)
    tokens, pairs, trained = held_3R.tolist()
    costs = weighed(cost.weights, held_3R).tolist()
    # of a leaf's tokens, those that the one before it in its run does not have
    new_L = np.maximum(again_L - line.shared_3L[0], 0)
    new_L[cuts[:-1]] = again_L[cuts[:-1]]
    return [Microbatch(np.sort(np.concatenate(samples_L[a:b])), tokens[i], pairs[i], trained[i], costs[i], int(new_L[a:b].sum()))
            for i, (a, b) in enumerate(pairwise(cuts.tolist()))]


def _deal(runs: list[Microbatch], ranks: int) -> list[list[Microbatch]]:
    """Each round gives one of the dearest runs left to every rank, the dearest to the rank that has least so far."""
    runs = sorted(runs, key=lambda m: -m.cost)
    runs += [Microbatch() for _ in range(-len(runs) % ranks)]
    dealt: list[list[Microbatch]] = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    for start in range(0, len(runs), ranks):
        for rank, run in zip(sorted(range(ranks), key=sums.__getitem__), runs[start:start + ranks], strict=True):
            dealt[rank].append(run)
            sums[rank] += run.cost
    return dealt


def _refuse_negative(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < inf:
            raise ValueError(f"{owner}.{name} = {value}: must be at least 0, and finite")


def _refuse_long(sample_L: np.ndarray, path_3L: np.ndarray, over: np.ndarray, budget: Budget) -> None:
    leaf = min(np.flatnonzero(over).tolist(), key=lambda i: sample_L[i])
    tokens, _, trained = path_3L[:, leaf].tolist()
    if tokens > budget.tokens:
        why = f"over budget.tokens = {budget.tokens}"
    else:
        need = budget.bytes_per_token * tokens + budget.bytes_per_trained * trained
        why = f"{trained} of them trained, which take {need:.4g} bytes, over budget.memory_bytes = {budget.memory_bytes:.4g}"
    others = f" ({int(over.sum()) - 1} more like it)" if over.sum() > 1 else ""
    raise ValueError(f"samples[{sample_L[leaf]}]: {tokens} tokens, {why}{others}; raise the budget, or stream=True computes it in pieces")


def _check(depth_T: np.ndarray, subtree_end_T: np.ndarray, last_S: np.ndarray, trained_T: np.ndarray, ranks: int) -> None:
    if ranks < 1:
        raise ValueError(f"ranks = {ranks}: must be at least 1")
    for name, value in (("subtree_end_T", subtree_end_T), ("trained_T", trained_T)):
        if value.shape != depth_T.shape:
            raise ValueError(f"{name}: shape {list(value.shape)}, but depth_T has {list(depth_T.shape)}")
    if trained_T.dtype != np.bool_:
        raise ValueError(f"trained_T: {trained_T.dtype}, must be bool")
    wrong = np.flatnonzero((last_S < 0) | (last_S >= len(depth_T)))
    if len(wrong):
        raise ValueError(f"last_S[{wrong[0]}] = {last_S[wrong[0]]}: must be from 0 to {len(depth_T) - 1}")
