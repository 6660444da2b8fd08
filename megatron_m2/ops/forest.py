"""Token forests from samples and from parents, on the host. C++: ``csrc/forest/``; the same in plain Python runs without a compiler.

What the arrays mean is written in :class:`megatron_m2.forest.TokenForest`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from megatron_m2.ops import _extension

# Shape suffixes: T tokens of the forest, N tokens of the samples, S samples.


class Merged(NamedTuple):
    """A forest of samples, and where they lie in it.

    Attributes:
        tokens: int64 [T].
        parent, depth, subtree_end: int32 [T].
        weight: float32 [T], sum of the weights of the samples' tokens; of a root 0.
        multiplicity: int32 [T], samples that pass through the token.
        place: int64 [N], index in the forest of each token of the samples.
    """

    tokens: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    subtree_end: np.ndarray
    weight: np.ndarray
    multiplicity: np.ndarray
    place: np.ndarray


def merge(tokens_N: np.ndarray, lengths_S: np.ndarray, weights_N: np.ndarray | None = None, parents_S: np.ndarray | None = None
          ) -> Merged:
    """The forest of the distinct prefixes of samples laid back to back. Children of a token come in order of first appearance.

    Args:
        tokens_N: int64 [N], contiguous.
        lengths_S: int64 [S], of each sample, at least 1.
        weights_N: float32 [N]; None: 1 each. Summed in fp64 in the order of the samples. Those of roots are ignored.
        parents_S: int64 [S]: the earlier sample that a sample goes on from, whose tokens it does not repeat; -1: none.

    Raises:
        ValueError: no sample, an empty one, lengths, weights or parents that do not fit, or 2^31 tokens or more after merging.
    """
    if not _extension.available():
        return merge_reference(tokens_N, lengths_S, weights_N, parents_S)
    return Merged(*_extension.module().merge_samples(tokens_N, lengths_S, weights_N, parents_S))


def measure(parent_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 [T] depth and subtree_end from the int32 [T] index of each token's parent, -1 for a root.

    Raises:
        ValueError: the parents are those of no forest in depth-first preorder; the message names the first token at fault.
    """
    if not _extension.available():
        return measure_reference(parent_T)
    depth, subtree_end = _extension.module().measure_forest(parent_T)
    return depth, subtree_end


def merge_reference(tokens_N: np.ndarray, lengths_S: np.ndarray, weights_N: np.ndarray | None = None,
                    parents_S: np.ndarray | None = None) -> Merged:
    """:func:`merge` token by token: a dictionary of children at each."""
    _check(tokens_N, lengths_S, weights_N, parents_S)
    children: list[dict[int, int]] = [{}]  # node 0 is the common root above all trees; nodes are in order of first appearance
    nodes: list[int] = []  # of each token of the samples
    last: list[int] = []  # node that each sample ends with
    ids = iter(tokens_N.tolist())
    for s, length in enumerate(lengths_S.tolist()):
        parent = -1 if parents_S is None else int(parents_S[s])
        node = 0 if parent < 0 else last[parent]
        for token in itertools.islice(ids, length):
            child = children[node].setdefault(token, len(children))
            if child == len(children):
                children.append({})
            node = child
            nodes.append(node)
        last.append(node)
    position = np.full(len(children), -1)
    parents: list[int] = []
    tokens: list[int] = []
    stack = [(child, token, -1) for token, child in reversed(children[0].items())]
    while stack:
        node, token, up = stack.pop()
        position[node] = here = len(parents)
        parents.append(up)
        tokens.append(token)
        stack.extend((child, token, here) for token, child in reversed(children[node].items()))
    place, parent_T = position[nodes], np.array(parents, dtype=np.int32)
    depth, end = measure_reference(parent_T)
    ends_before = np.concatenate([[0], np.cumsum(np.bincount(position[last], minlength=len(parents)))])  # samples ending before a token
    weight = np.bincount(place, weights_N, minlength=len(parents)) if weights_N is not None else ends_before[end] - ends_before[:-1]
    return Merged(np.array(tokens, dtype=np.int64), parent_T, depth, end, np.where(parent_T < 0, 0.0, weight).astype(np.float32),
                  (ends_before[end] - ends_before[:-1]).astype(np.int32), place)


def _check(tokens_N: np.ndarray, lengths_S: np.ndarray, weights_N: np.ndarray | None, parents_S: np.ndarray | None) -> None:
    if not len(lengths_S):
        raise ValueError("samples: empty")
    if lengths_S.min() < 1:
        raise ValueError(f"samples[{int(np.argmax(lengths_S < 1))}]: empty")
    if lengths_S.sum() != len(tokens_N):
        raise ValueError(f"lengths: they add up to {lengths_S.sum()}, need the {len(tokens_N)} of tokens")
    if weights_N is not None and len(weights_N) != len(tokens_N):
        raise ValueError(f"weights: {len(weights_N)} values for {len(tokens_N)} tokens")
    if parents_S is None:
        return
    if len(parents_S) != len(lengths_S):
        raise ValueError(f"parents: {len(parents_S)} for {len(lengths_S)} samples")
    wrong = (parents_S < -1) | (parents_S >= np.arange(len(parents_S)))
    if wrong.any():
        s = int(np.argmax(wrong))
        raise ValueError(f"parents[{s}] = {parents_S[s]}: need an earlier sample, or -1 for none")


def measure_reference(parent_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """:func:`measure` in plain Python."""
    depth, ends = [], [len(parent_T)] * len(parent_T)
    path: list[int] = []  # the tokens whose subtrees are open
    for t, parent in enumerate(parent_T.tolist()):
        if not -1 <= parent < t:
            raise ValueError(f"parent[{t}] = {parent}: a parent lies before its child, or is -1 for a root")
        while path and path[-1] > parent:
            ends[path.pop()] = t
        if (path[-1] if path else -1) != parent:
            raise ValueError(f"parent[{t}] = {parent}: not in depth-first preorder, the parent's subtree has ended")
        depth.append(len(path))
        path.append(t)
    return np.array(depth, dtype=np.int32), np.array(ends, dtype=np.int32)
