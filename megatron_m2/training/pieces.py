"""A token forest cut into pieces that can be computed one after the other, depth first, with only the way back to the root kept.

A piece is a run of tokens in preorder. It sees itself and its path: the ancestors of its first token. Two rules make that enough:

- It ends where the subtree of its first token's parent ends, so that all its tokens have the whole path above them.
- Of siblings only the last may be begun and left unfinished, so that all that comes later and descends from a piece descends from the
  last of its unfinished tokens. Pieces nest, what they keep is a stack, and that is never more than one path.

Light siblings are put before heavy ones, so that small subtrees share a piece with what comes before them. Without that the branches
along a chain, which come after the chain's end, each would be a piece. With it there are at most ``4 T / piece_tokens + 1`` pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_m2.forest import TokenForest


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop).

    Attributes:
        depth: of the first token: how many tokens its path has.
        nesting: how many pieces these are from.
        kept: int64, those of the tokens that later pieces descend from, counted from ``start``: a path, from its top; empty for most.
    """

    start: int
    stop: int
    depth: int
    nesting: int
    kept: np.ndarray

    def __len__(self) -> int:
        return self.stop - self.start


def lightest_first(forest: TokenForest) -> tuple[TokenForest, Tensor]:
    """The same forest with every token's children (and the roots) in the order of their subtrees' sizes.

    Returns:
        The forest, and int64 [T], where each of its tokens is in the one given.
    """
    parent, end = (x.cpu().numpy().astype(np.int64) for x in (forest.parent, forest.subtree_end))
    index = np.arange(len(parent))
    size = end - index
    siblings = np.lexsort((index, size, parent))
    first = np.flatnonzero(np.diff(parent[siblings], prepend=-2))  # of each group of siblings
    before = np.cumsum(size[siblings]) - size[siblings]
    step = np.empty_like(size)  # how far a token is behind its parent: itself and its lighter siblings
    step[siblings] = before - np.repeat(before[first], np.diff(first, append=len(index)))
    step += parent >= 0
    # a token's place is the sum of the steps on its path; each counts from its token to the end of its subtree
    change = np.bincount(index, step, len(index) + 1) - np.bincount(end, step, len(index) + 1)
    place = np.cumsum(change)[:-1].astype(np.int64)
    order = np.empty_like(place)
    order[place] = index
    moved = torch.from_numpy(order).to(forest.device)
    new_parent = np.where(parent < 0, -1, place[parent])[order].astype(np.int32)
    new_end = (place + size)[order].astype(np.int32)
    fields = {name: value[moved] for name, value in vars(forest).items() if value is not None}
    fields |= {"parent": torch.from_numpy(new_parent).to(forest.device), "subtree_end": torch.from_numpy(new_end).to(forest.device)}
    return replace(forest, **fields), moved


def cut(forest: TokenForest, piece_tokens: int) -> list[Piece]:
    """Pieces of at most so many tokens, one after the other, of a forest in the order of :func:`lightest_first`.

    A subtree that would fit into a piece is never divided.

    Raises:
        ValueError: piece_tokens below 1.
    """
    if piece_tokens < 1:
        raise ValueError(f"piece_tokens: {piece_tokens}, need 1 or more")
    parent, end, depth = (x.tolist() for x in (forest.parent, forest.subtree_end, forest.depth))
    around: list[Piece] = []  # pieces with tokens on the path
    pieces: list[Piece] = []
    start = 0
    while start < len(parent):
        while around and parent[start] < around[-1].start:
            around.pop()
        stop = _stop(start, piece_tokens, parent, end)
        kept = []
        above = parent[stop] if stop < len(parent) else -1
        while above >= start:
            kept.append(above - start)
            above = parent[above]
        piece = Piece(start, stop, depth[start], len(around), np.array(kept[::-1], dtype=np.int64))
        pieces.append(piece)
        if kept:
            around.append(piece)
        start = stop
    return pieces


def _stop(start: int, piece_tokens: int, parent: list[int], end: list[int]) -> int:
    """Where the piece ends that begins at ``start``."""
    full = start + piece_tokens
    last = end[parent[start]] if parent[start] >= 0 else len(end)
    t = start
    while t < last:
        if end[t] <= full:
            t = end[t]
            continue
        may_begin = t == start or end[t] == (end[parent[t]] if parent[t] >= 0 else len(end))
        if end[t] - t <= piece_tokens or t == full or not may_begin:
            break  # undivided or begun anew, the next piece has it
        t += 1
    return t
