"""The token forest: builders against brute force, refusal of what is no forest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_m2.forest import TokenForest, merge_samples
from megatron_m2.ops.tree_attention import visibility
from tests.conftest import random_samples

SAMPLES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=7), min_size=1, max_size=8)


def path_to(forest: TokenForest, t: int) -> list[int]:
    path = []
    while t >= 0:
        path.append(t)
        t = int(forest.parent[t])
    return path[::-1]


@given(SAMPLES)
def test_merge_keeps_every_sample_and_stores_each_prefix_once(samples):
    forest, paths = merge_samples(samples)
    forest.validate()
    for sample, path in zip(samples, paths, strict=True):
        assert forest.tokens[torch.from_numpy(path)].tolist() == sample
        assert path_to(forest, int(path[-1])) == path.tolist()
    prefixes = {tuple(s[: i + 1]) for s in samples for i in range(len(s))}
    assert len(forest) == len(prefixes)
    through = {p: sum(tuple(s[: len(p)]) == p for s in samples) for p in prefixes}
    stored = {tuple(forest.tokens[path_to(forest, t)].tolist()): int(forest.multiplicity[t]) for t in range(len(forest))}
    assert stored == through
    assert forest.weight.tolist() == [float(m) if p >= 0 else 0.0 for m, p in zip(forest.multiplicity, forest.parent, strict=True)]


@given(SAMPLES)
def test_visible_tokens_are_exactly_the_path(samples):
    forest, _ = merge_samples(samples)
    visible = visibility(forest.subtree_end)
    for t in range(len(forest)):
        assert visible[t].nonzero().squeeze(1).tolist() == path_to(forest, t)
        assert forest.depth[t] == len(path_to(forest, t)) - 1


@given(SAMPLES)
def test_without_roots_is_the_forest_of_the_samples_without_their_first_token(samples):
    forest, _ = merge_samples(samples)
    smaller, kept = forest.without_roots()
    assert kept.tolist() == [t for t in range(len(forest)) if forest.parent[t] >= 0]
    if len(smaller) == 0:
        return
    smaller.validate()
    for new, old in enumerate(kept.tolist()):
        assert kept[path_to(smaller, new)].tolist() == path_to(forest, old)[1:]
    assert torch.equal(smaller.multiplicity, forest.multiplicity[kept])


def test_weights_of_a_shared_token_are_summed():
    forest, paths = merge_samples([[1, 2, 3], [1, 2, 4]], weights=[[9, 0.5, 2], [9, 0.25, 3]])
    assert forest.weight[paths[0]].tolist() == [0.0, 0.75, 2.0]
    assert forest.weight[paths[1]].tolist() == [0.0, 0.75, 3.0]


def test_documents_are_chains():
    forest = TokenForest.from_documents([[5, 6, 7], [8], [9, 9]])
    forest.validate()
    assert forest.parent.tolist() == [-1, 0, 1, -1, -1, 4]
    assert forest.subtree_end.tolist() == [3, 3, 3, 4, 6, 6]
    assert forest.weight.tolist() == [0, 1, 1, 0, 0, 1]
    targets, sources = forest.predictions()
    assert targets.tolist() == [1, 2, 5]
    assert sources.tolist() == [0, 1, 4]
    same = TokenForest.from_samples([[5, 6, 7], [8], [9, 9]])
    for field in ("tokens", "parent", "depth", "subtree_end", "weight"):
        assert torch.equal(getattr(forest, field), getattr(same, field))


@pytest.mark.parametrize(("field", "at", "value"), [
    ("parent", 3, 3), ("parent", 2, -2), ("parent", 4, 0), ("depth", 2, 5), ("subtree_end", 1, 1), ("subtree_end", 0, 99),
    ("subtree_end", 3, 6), ("weight", 0, 1.0),
])
def test_what_is_no_forest_is_refused_by_field(field, at, value):
    good = TokenForest.from_samples([[1, 2, 3], [1, 2, 4, 5], [1, 6]])
    good.validate()
    values = getattr(good, field).clone()
    values[at] = value
    with pytest.raises(ValueError, match=r"(parent|depth|subtree_end|weight)\["):
        replace(good, **{field: values}).validate()


@given(st.integers(0, 10_000), st.integers(0, 30), st.integers(0, 30))
def test_any_changed_subtree_end_is_refused(seed, at, value):
    good = TokenForest.from_samples(random_samples(seed))
    at %= len(good)
    value %= len(good) + 2
    if int(good.subtree_end[at]) != value:
        ends = good.subtree_end.clone()
        ends[at] = value
        with pytest.raises(ValueError, match="subtree_end"):
            replace(good, subtree_end=ends).validate()


def test_wrong_dtypes_and_shapes_are_refused_by_field():
    good = TokenForest.from_documents([[1, 2, 3]])
    with pytest.raises(ValueError, match=r"tokens: torch\.int32"):
        replace(good, tokens=good.tokens.int()).validate()
    with pytest.raises(ValueError, match=r"depth: torch.int32 \[2\]"):
        replace(good, depth=good.depth[:2]).validate()
    with pytest.raises(ValueError, match="parent: shape"):
        TokenForest.from_parent([1, 2], [-1])
    with pytest.raises(ValueError, match=r"parent\[1\] = 1"):
        TokenForest.from_parent([1, 2], [-1, 1])
    with pytest.raises(ValueError, match="documents"):
        TokenForest.from_documents([[1], []])
    with pytest.raises(ValueError, match=r"samples\[1\]"):
        TokenForest.from_samples([[1], []])
    with pytest.raises(ValueError, match=r"weights\[0\]: 1 values for 2"):
        TokenForest.from_samples([[1, 2]], weights=[[1.0]])


def test_a_tree_out_of_preorder_is_refused():
    with pytest.raises(ValueError, match="preorder"):
        TokenForest.from_parent(np.arange(5), [-1, 0, 0, 1, 2])  # children of 1 and 2 interleave
