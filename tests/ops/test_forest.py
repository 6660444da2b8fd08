"""The forest builder of C++ beside the one that follows a dictionary token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_m2.forest import TokenForest, merge_samples
from megatron_m2.ops import _extension
from megatron_m2.ops.forest import Merged, measure, measure_reference, merge, merge_reference
from tests.conftest import needs_kernels, random_samples


def flat(samples: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([t for s in samples for t in s], dtype=np.int64), np.array([len(s) for s in samples], dtype=np.int64)


def assert_same(samples: list[list[int]], weights: np.ndarray | None = None) -> None:
    for name, mine, reference in zip(Merged._fields, merge(*flat(samples), weights), merge_reference(*flat(samples), weights), strict=True):
        assert mine.dtype == reference.dtype, name
        np.testing.assert_array_equal(mine, reference, err_msg=name)


few_ids = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)
any_ids = st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4), min_size=1, max_size=6)


@needs_kernels
@settings(max_examples=300)
@given(few_ids | any_ids)
@example([[7] * 100, [7] * 31, [7] * 33, [7] * 32 + [8], [7] * 100])  # ends and branches about the step of a comparison
@example([[1, 2, 3, 4], [1, 2], [1, 2, 3, 4, 5], [1], [1, 2, 9]])  # one edge cut again and again, from both ends
@example([[1, 2, 3], [4], [1, 2, 5], [6], [1, 7], [4, 4]])  # a cut edge keeps its place among its siblings, first, middle and last
def test_equals_the_reference(samples):
    assert_same(samples)


@needs_kernels
@pytest.mark.parametrize(("count", "length", "vocab"), [(300, 40, 3), (40, 200, 100), (5, 3000, 2)])
def test_equals_the_reference_on_many_cuts(count, length, vocab):
    for seed in range(5):
        samples = random_samples(seed, count, vocab, length, branching=9)
        assert_same(samples)
        rng = np.random.default_rng(seed)
        samples = [samples[i] for i in rng.permutation(count)] + samples[::2]
        assert_same(samples, rng.standard_normal(sum(map(len, samples))).astype(np.float32))


@needs_kernels
@given(few_ids, st.integers(0, 2**20))
def test_weights_are_summed_in_order(samples, seed):
    """Of very unequal size: sums in another order, or in fp32, would show."""
    rng = np.random.default_rng(seed)
    count = sum(map(len, samples))
    assert_same(samples, (rng.standard_normal(count) * 10.0 ** rng.integers(-9, 9, count)).astype(np.float32))


@needs_kernels
def test_first_weights_are_ignored_and_nan_stays():
    merged = merge(*flat([[1, 2], [1, 2], [3]]), np.array([np.nan, 1, np.inf, np.nan, np.nan], dtype=np.float32))
    np.testing.assert_array_equal(merged.weight, np.array([0, np.nan, 0], dtype=np.float32))


@needs_kernels
def test_ten_thousand_siblings_and_a_long_chain():
    """A fan, and a chain from which a branch goes off at every token: no step may depend on how many there are."""
    assert_same([[5, t] for t in range(10_000)] + [[5, t, 1] for t in range(9_999, 0, -7)])
    chain = list(range(600))
    assert_same([[*chain[:n], -1] for n in range(600)] + [chain])


@settings(max_examples=300)
@given(st.lists(st.integers(-2, 12), max_size=12) | few_ids.map(lambda s: merge_samples(s)[0].parent.tolist()))
@example([])
@example([-1, 0, 1, 0, -1, 4])
@example([-1, 0, 0, 1])
def test_measure_equals_the_reference(parents):
    parent = np.array(parents, dtype=np.int32)

    def outcome(op) -> list[tuple] | str:
        try:
            return [(x.dtype, x.tolist()) for x in op(parent)]
        except ValueError as error:
            return str(error)

    assert outcome(measure) == outcome(measure_reference)


@pytest.mark.parametrize("seed", range(5))
def test_parents_give_back_the_forest(seed):
    forest, _ = merge_samples(random_samples(seed, 30, 3, 20))
    again = TokenForest.from_parent(forest.tokens.numpy(), forest.parent.numpy())
    for field in ("parent", "depth", "subtree_end"):
        np.testing.assert_array_equal(getattr(again, field), getattr(forest, field))


@pytest.mark.parametrize("builder", [pytest.param(merge, marks=needs_kernels), merge_reference])
@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(-1, 11), st.lists(st.integers(0, 2), min_size=1, max_size=6)), min_size=1, max_size=12),
       st.integers(0, 2**20))
def test_samples_that_go_on_from_earlier_ones_equal_whole_samples(builder, parts, seed):
    parents = [parent if parent < s else -1 for s, (parent, _) in enumerate(parts)]
    whole: list[list[int]] = []
    for parent, (_, own) in zip(parents, parts, strict=True):
        whole.append(([] if parent < 0 else whole[parent]) + own)
    weights = [np.random.default_rng(seed + s).standard_normal(len(own)).astype(np.float32) for s, (_, own) in enumerate(parts)]
    mine = builder(*flat([own for _, own in parts]), np.concatenate(weights), np.array(parents))
    padded = np.concatenate([np.pad(w, (len(all_) - len(w), 0)) for w, all_ in zip(weights, whole, strict=True)])
    reference = merge_reference(*flat(whole), padded)
    for name in Merged._fields[:-1]:
        np.testing.assert_array_equal(getattr(mine, name), getattr(reference, name), err_msg=name)
    ends = np.cumsum([len(w) for w in whole])
    np.testing.assert_array_equal(mine.place, np.concatenate([reference.place[end - len(own) : end]
                                                              for end, (_, own) in zip(ends, parts, strict=True)]))


@pytest.mark.parametrize("builder", [merge, merge_reference])
def test_what_does_not_fit_is_named(builder):
    tokens = np.arange(5)
    for lengths, weights, message in (
        ([], None, "samples: empty"), ([2, 0, 3], None, r"samples\[1\]: empty"), ([2, 2], None, "lengths: they add up to 4, need the 5"),
        ([2, 4], None, "lengths"), ([2, 3], [1.0], "weights: 1 values for 5 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            builder(tokens, np.array(lengths, dtype=np.int64), None if weights is None else np.array(weights, dtype=np.float32))
    for parents, message in (([0, -1], r"parents\[0\] = 0"), ([-1, 1], r"parents\[1\] = 1"), ([-1, -2], r"parents\[1\] = -2"),
                             ([-1], "parents: 1 for 2 samples")):
        with pytest.raises(ValueError, match=message):
            builder(tokens, np.array([2, 3]), None, np.array(parents))


def test_samples_of_any_kind_are_taken_and_bad_ones_named():
    kinds = [[1, 2, 3], (1, 2), np.array([1, 2, 4], dtype=np.uint16), np.arange(1, 9, 2)]
    forest, places = merge_samples(kinds, [[0.5] * len(s) for s in kinds])
    assert [forest.tokens[p].tolist() for p in places] == [list(s) for s in kinds]
    assert forest.weight.tolist() == [0.0, 1.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="weights: 1 samples, need 2"):
        merge_samples([[1], [2]], [[1.0]])
    with pytest.raises(ValueError, match="samples: empty"):
        merge_samples([])


def test_runs_without_the_extension(monkeypatch):
    samples = random_samples(3, 20)
    built = merge_samples(samples)
    monkeypatch.setattr(_extension, "_DEVICES", frozenset())
    plain = merge_samples(samples)
    for field in ("tokens", "parent", "depth", "subtree_end", "weight", "multiplicity"):
        np.testing.assert_array_equal(getattr(plain[0], field), getattr(built[0], field))
    for mine, reference in zip(plain[1], built[1], strict=True):
        np.testing.assert_array_equal(mine, reference)
