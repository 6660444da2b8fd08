"""Samples to one token forest: every shared prefix once, and beside it the pairs (sample, trained token) that a loss is made of.

What differs between samples that share a token (old log-probs, advantages, versions, weights) belongs to its pairs; the token has one
log-prob. A part of the samples is a part of the forest (:meth:`MergedSamples.take`), with nothing merged again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from megatron_m2.forest import TokenForest
from megatron_m2.forge.learner.samples import Batch, Sample, flatten
from megatron_m2.ops.forest import Merged, merge

# Shape suffixes: T tokens of the forest, N tokens of the samples, S samples, P pairs, L layers, K experts per token.

RouteConflict = Literal["split", "first"]
Sharing = Literal["tree", "chains", "none"]


@dataclass(frozen=True)
class Pairs:
    """Trained tokens of samples, ordered by (token, sample).

    Attributes:
        token: int64 [P], index in the forest. sample: int64 [P], index in the batch. position: int64 [P], index among the tokens of all
            the batch's samples, one after the other.
        old_logprobs, advantages: fp32 [P].
        versions: int32 [P], -1 where not known. reference_logprobs: fp32 [P], NaN where not given.
    """

    token: np.ndarray
    sample: np.ndarray
    position: np.ndarray
    old_logprobs: np.ndarray
    advantages: np.ndarray
    versions: np.ndarray
    reference_logprobs: np.ndarray

    def __len__(self) -> int:
        return len(self.token)

    def where(self, chosen_P: np.ndarray, place_T: np.ndarray | None = None) -> Pairs:
        """Those at an index or mask; ``place_T``: where the forest's tokens have gone."""
        values: dict[str, Any] = {f.name: getattr(self, f.name)[chosen_P] for f in fields(self)}
        if place_T is not None:
            values["token"] = place_T[values["token"]]
        return Pairs(**values)


class RouteReport(NamedTuple):
    """Recorded routes, counted per token of a sample and layer. disagreeing: other than those of the first sample through the token."""

    recorded: int
    disagreeing: int


@dataclass(frozen=True)
class MergedSamples:
    """Samples of a batch, merged.

    Attributes:
        forest: on the CPU; weighs 1 where a pair predicts the token, multiplicity counts these samples.
        samples: int64 [S], their indices in the batch. last: int64 [S], the forest index of each one's last token.
        pairs: of these samples.
    """

    forest: TokenForest
    samples: np.ndarray
    last: np.ndarray
    pairs: Pairs

    @property
    def lengths(self) -> np.ndarray:
        """int64 [S], tokens of each sample alone, all before its own included."""
        return self.forest.depth.numpy()[self.last].astype(np.int64) + 1

    def nothing(self) -> MergedSamples:
        """A forest of one token that trains nothing and counts for nothing."""
        chain = TokenForest.from_parent(self.forest.tokens[:1].numpy(), [-1], multiplicity=np.zeros(1))
        none = np.empty(0, dtype=np.int64)
        return MergedSamples(chain, none, none, self.pairs.where(none))

    def take(self, samples: np.ndarray) -> MergedSamples:
        """A part: the forest of these samples (indices in the batch, each among ``self.samples``) alone."""
        chosen = np.isin(self.samples, samples)
        return _part(self, self.samples[chosen], self.last[chosen])


def merge_samples(batch: Batch, routes: RouteConflict = "split", sharing: Sharing = "tree") -> tuple[MergedSamples, RouteReport]:
    """Merges a batch. Linear in the samples' own tokens.

    Args:
        routes: where samples that share a token carry different routes, ``split`` gives each its own token from there on, so that the
            result is exact; ``first`` keeps one token with the routes of the first sample, and the report says how often that was wrong.
        sharing: "tree": every prefix that samples share is stored once. "chains": only where a sample goes on from the end of another, at
            most one of each. "none": each sample stands alone. The last two are what others do, to compare with.

    Raises:
        ValueError: no sample.
    """
    if not len(batch.samples) or batch.context.all():
        raise ValueError("samples: empty, nothing to train")
    batch = batch if sharing == "tree" else flatten(batch)
    samples = batch.samples
    lengths = np.array([len(s.tokens) for s in samples], dtype=np.int64)
    tokens_N = np.concatenate([s.tokens for s in samples])
    merged = merge(tokens_N, lengths, None, batch.parents)
    if sharing != "tree":
        merged = _apart(merged, tokens_N, lengths, chains=sharing == "chains")
    routes_T, report = None, RouteReport(0, 0)
    if any(s.routes is not None for s in samples):
        routes_NLK = _recorded(samples)
        routes_T, disagrees_N, report = _first_routes(routes_NLK, merged.place, len(merged.tokens))
        if routes == "split" and disagrees_N.any():
            contested_T = np.zeros(len(routes_T), dtype=bool)
            contested_T[merged.place[disagrees_N]] = True
            routes_NLK = _filled(routes_NLK, routes_T[merged.place])
            merged, routes_T = _split(tokens_N, routes_NLK, contested_T[merged.place], lengths, batch.parents)
    last = merged.place[np.cumsum(lengths) - 1]
    forest = TokenForest(*map(torch.from_numpy, merged[:-1]))
    if routes_T is not None:
        forest = replace(forest, routes=torch.from_numpy(routes_T))
    whole = MergedSamples(forest, np.arange(len(samples)), last, _pairs(samples, lengths, merged.place))
    live = np.flatnonzero(~batch.context)
    return _part(whole, live, last[live]), report


def _pairs(samples: Sequence[Sample], lengths: np.ndarray, place_N: np.ndarray) -> Pairs:
    def flat(values: Sequence[np.ndarray | None], fill: float, dtype: type) -> np.ndarray:
        return np.concatenate([np.full(n, fill, dtype) if v is None else np.asarray(v, dtype)
                               for v, n in zip(values, lengths, strict=True)])[trained_N]

    trained_N = np.concatenate([s.trainable for s in samples])
    token = place_N[trained_N]
    pairs = Pairs(token, np.repeat(np.arange(len(samples)), lengths)[trained_N], np.flatnonzero(trained_N),
                  flat([s.old_logprobs for s in samples], 0, np.float32), flat([s.advantages for s in samples], 0, np.float32),
                  flat([s.versions for s in samples], -1, np.int32), flat([s.reference_logprobs for s in samples], np.nan, np.float32))
    return pairs.where(np.argsort(token, kind="stable"))


def _part(whole: MergedSamples, samples: np.ndarray, last: np.ndarray) -> MergedSamples:
    forest = whole.forest
    parent, end = forest.parent.numpy(), forest.subtree_end.numpy()
    ends_before = np.zeros(len(forest) + 1, dtype=np.int64)  # how many of the samples end before each token
    np.cumsum(np.bincount(last, minlength=len(forest)), out=ends_before[1:])
    multiplicity = ends_before[end] - ends_before[:-1]
    kept = np.flatnonzero(multiplicity)
    before = np.zeros(len(forest) + 1, dtype=np.int64)  # tokens kept before each
    np.cumsum(multiplicity > 0, out=before[1:])
    mine = np.zeros(int(max(whole.samples.max(), samples.max())) + 1, dtype=bool)
    mine[samples] = True
    pairs = whole.pairs.where(mine[whole.pairs.sample], before[:-1])
    weight = np.zeros(len(kept), dtype=np.float32)
    weight[pairs.token] = 1
    up = parent[kept]
    part = TokenForest(forest.tokens[kept], torch.from_numpy(np.where(up < 0, -1, before[up]).astype(np.int32)), forest.depth[kept],
                       torch.from_numpy(before[end[kept]].astype(np.int32)), torch.from_numpy(weight),
                       torch.from_numpy(multiplicity[kept].astype(np.int32)),
                       None if forest.routes is None else forest.routes[kept])
    return MergedSamples(part, samples, before[last], pairs)


def _apart(tree: Merged, tokens_N: np.ndarray, lengths: np.ndarray, chains: bool) -> Merged:
    """Merged anew, each sample under a root of its own, or of the chain that it makes longer."""
    ends = np.cumsum(lengths)
    root_S = np.arange(len(lengths))
    if chains:
        tails: dict[int, int] = {}  # last token of each chain so far -> its root
        for s, last in enumerate(tree.place[ends - 1].tolist()):
            before = [t for t in tails if t <= last < tree.subtree_end[t]]
            root_S[s] = tails.pop(max(before)) if before else s
            tails[last] = root_S[s]
    keys_N = tokens_N.copy()
    keys_N[ends - lengths] = tokens_N.max() + 1 + root_S
    merged = merge(keys_N, lengths)
    tokens_T = np.empty(len(merged.tokens), np.int64)
    tokens_T[merged.place] = tokens_N
    return merged._replace(tokens=tokens_T)


# ---- routes ------------------------------------------------------------------------------------------------------------------------


def _recorded(samples: Sequence[Sample]) -> np.ndarray:
    """int16 [N, L, K], -1 where a sample has none."""
    layers, top_k = next(s.routes.shape[1:] for s in samples if s.routes is not None)
    return np.concatenate([np.full((len(s.tokens), layers, top_k), -1, np.int16) if s.routes is None else s.routes for s in samples])


def _filled(routes_NLK: np.ndarray, from_NLK: np.ndarray) -> np.ndarray:
    """With what was recorded of the same token elsewhere, where nothing was: the last token of a completion is run only when another call
    goes on from it."""
    return np.where(routes_NLK < 0, from_NLK, routes_NLK)


def _first_routes(routes_NLK: np.ndarray, place_N: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray, RouteReport]:
    """Of every token and layer what the first sample recorded [T, L, K]; which tokens of samples disagree [N]; how often."""
    first = np.full((tokens, *routes_NLK.shape[1:]), -1, np.int16)
    recorded = routes_NLK[..., 0] >= 0
    for layer in range(routes_NLK.shape[1]):
        rows = np.flatnonzero(recorded[:, layer])[::-1]
        first[place_N[rows], layer] = routes_NLK[rows, layer]  # the last write stays: that of the first sample
    disagrees_NL = recorded & (np.sort(routes_NLK, -1) != np.sort(first, -1)[place_N]).any(-1)
    return first, disagrees_NL.any(-1), RouteReport(int(recorded.sum()), int(disagrees_NL.sum()))


def _split(tokens_N: np.ndarray, routes_NLK: np.ndarray, contested_N: np.ndarray, lengths: np.ndarray, parents: np.ndarray
           ) -> tuple[Merged, np.ndarray]:
    """Merged with contested tokens of other routes taken for other tokens, and the routes of each."""
    sets = np.sort(routes_NLK[contested_N], -1).reshape(int(contested_N.sum()), -1)  # a set of experts has no order
    rows = np.concatenate([np.ascontiguousarray(tokens_N[contested_N])[:, None].view(np.int16), sets], axis=1)
    keys_N = tokens_N.copy()
    keys_N[contested_N] = tokens_N.max() + 1 + np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    merged = merge(keys_N, lengths, None, parents)
    tokens_T, routes_T = np.empty(len(merged.tokens), np.int64), np.empty((len(merged.tokens), *routes_NLK.shape[1:]), np.int16)
    tokens_T[merged.place], routes_T[merged.place] = tokens_N, routes_NLK
    return merged._replace(tokens=tokens_T), routes_T
