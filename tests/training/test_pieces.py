"""Pieces of a forest: they cover it, nest, keep no more than one path, and are about as many as its tokens ask for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_m2.forest import TokenForest, merge_samples
from megatron_m2.training.pieces import cut, lightest_first


def random_forest(seed, tokens, fork, end=0.0):
    """Each token goes on from the last one, or with chance ``fork`` from any of its ancestors; with chance ``end`` it is a root."""
    rng = np.random.default_rng(seed)
    parent, path = [-1], [0]
    for t in range(1, tokens):
        if rng.random() < end:
            path = []
        elif rng.random() < fork:
            path = path[: rng.integers(1, len(path) + 1)]
        parent.append(path[-1] if path else -1)
        path.append(t)
    return TokenForest.from_parent(np.arange(tokens), parent)


def forests(most):
    return st.builds(random_forest, st.integers(0, 10**6), st.integers(1, most), st.sampled_from([0, 0.02, 0.1, 0.3, 0.7]),
                     st.sampled_from([0, 0.03, 0.3]))


def children(forest):
    found = {t: [] for t in range(-1, len(forest))}
    for t, parent in enumerate(forest.parent.tolist()):
        found[parent].append(t)
    return found


def ancestors(forest, t):
    found = []
    while (t := int(forest.parent[t])) >= 0:
        found.append(t)
    return found[::-1]


@settings(max_examples=200)
@given(forest=forests(80))
def test_lightest_first_is_the_same_forest_in_another_order(forest):
    moved, where = lightest_first(forest)
    moved.validate()
    assert sorted(where.tolist()) == list(range(len(forest)))
    assert torch.equal(moved.tokens, forest.tokens[where])
    for t in range(len(forest)):
        assert [int(where[a]) for a in ancestors(moved, t)] == ancestors(forest, int(where[t]))
    size = (moved.subtree_end - torch.arange(len(moved))).tolist()
    for siblings in children(moved).values():
        assert [size[s] for s in siblings] == sorted(size[s] for s in siblings)


@settings(max_examples=200)
@given(forest=forests(80), piece_tokens=st.one_of(st.integers(1, 8), st.integers(1, 90)))
def test_pieces_cover_nest_and_keep_one_path(forest, piece_tokens):
    forest, _ = lightest_first(forest)
    pieces = cut(forest, piece_tokens)
    assert [p.start for p in pieces] + [len(forest)] == [0] + [p.stop for p in pieces]
    open_pieces = []
    for piece in pieces:
        assert 1 <= len(piece) <= piece_tokens
        path = ancestors(forest, piece.start)
        assert piece.depth == len(path)
        while open_pieces and not set(path) & set(range(open_pieces[-1].start, open_pieces[-1].stop)):
            open_pieces.pop()
        assert piece.nesting == len(open_pieces)
        # what these pieces keep is the whole path, all of it and nothing else
        assert [p.start + int(t) for p in open_pieces for t in p.kept] == path
        inside = set(range(piece.start, piece.stop))
        for t in range(piece.start, piece.stop):
            assert set(ancestors(forest, t)) - inside == set(path)  # every token sees the whole path
        below = {a for t in range(piece.stop, len(forest)) for a in ancestors(forest, t) if a in inside}
        assert sorted(below) == [piece.start + int(t) for t in piece.kept]
        later = {int(forest.parent[t]) for t in range(piece.stop, len(forest))} & inside
        assert later <= {piece.start + int(piece.kept[-1])} if len(piece.kept) else not later
        if len(piece.kept):
            open_pieces.append(piece)


@settings(max_examples=200)
@given(forest=forests(200), piece_tokens=st.integers(1, 60))
def test_never_more_than_four_times_as_many_pieces(forest, piece_tokens):
    forest, _ = lightest_first(forest)
    assert len(cut(forest, piece_tokens)) <= 4 * len(forest) / piece_tokens + 1
    size = (forest.subtree_end - torch.arange(len(forest))).tolist()
    for piece in cut(forest, piece_tokens):
        for t in range(piece.start, piece.stop):
            assert size[t] > piece_tokens or t + size[t] <= piece.stop  # what fits into one piece is in one


def comb(chain, every, tooth):
    """A chain and, every so many tokens, a short branch; the chain comes first, as a sample that was drawn first would."""
    teeth = [[*range(at), *range(10**6 + at, 10**6 + at + tooth)] for at in range(every, chain, every)]
    return merge_samples([list(range(chain)), *teeth])[0]


def star(prefix, branches, length):
    return merge_samples([[*range(prefix), *range(10**6 + b * length, 10**6 + (b + 1) * length)] for b in range(branches)])[0]


@pytest.mark.parametrize(("forest", "most"), [
    (star(1, 1, 20_000), 1.1), (comb(16_384, 64, 4), 1.1), (comb(16_384, 64, 60), 1.1), (star(2048, 64, 256), 1.1),
    (star(500, 16, 700), 1.5),
    (random_forest(0, 20_000, 0.01), 2), (random_forest(1, 20_000, 0.1), 1.5), (random_forest(2, 20_000, 0.5), 1.1)],
    ids=["chain", "comb", "thick comb", "star", "branches of 2.7 pieces", "random", "bushy", "bushier"])
def test_number_of_pieces(forest, most):
    forest, _ = lightest_first(forest)
    assert len(cut(forest, 256)) <= most * len(forest) / 256 + 1


def test_a_chain_that_ends_in_the_middle_of_its_forest_is_no_reason_for_small_pieces():
    """Without :func:`lightest_first` every tooth of the comb is a piece."""
    forest = comb(4096, 64, 4)
    assert len(cut(forest, 256)) > 60
    assert len(cut(lightest_first(forest)[0], 256)) <= 19


def test_pieces_of_no_tokens_are_refused():
    with pytest.raises(ValueError, match=r"piece_tokens: 0, need 1 or more"):
        cut(star(1, 1, 3), 0)
