"""Merged samples, their pairs, and parts of them."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_m2.forge.learner.merge import Pairs, merge_samples
from megatron_m2.forge.learner.samples import Batch, check
from tests.conftest import tiny_config
from tests.forge.learner.cases import path_of, samples_of

MODEL = tiny_config()
shapes = st.fixed_dictionaries({"seed": st.integers(0, 2**20), "count": st.integers(1, 9), "length": st.integers(2, 12),
                                "branching": st.integers(1, 6), "routed": st.sampled_from(["", "anyhow"])})


@given(shapes)
def test_pairs_are_the_trained_tokens_of_samples(shape):
    """Followed from each token of the forest up to its root, they read as their samples do."""
    samples = samples_of(**shape, model=MODEL, parents=True)
    merged, _ = merge_samples(check(samples, MODEL))
    tokens, parent = merged.forest.tokens.tolist(), merged.forest.parent.tolist()

    def path(t):
        return ([] if parent[t] < 0 else path(parent[t])) + [tokens[t]]

    found = [(int(s), tuple(path(t))) for s, t in zip(merged.pairs.sample, merged.pairs.token.tolist(), strict=True)]
    expected, values = [], []
    for i, s in enumerate(samples):
        whole = path_of(s, samples)
        for t in np.flatnonzero(whole.trainable):
            expected.append((i, tuple(whole.tokens[: t + 1].tolist())))
            values.append((whole.old_logprobs[t], whole.advantages[t], s.versions[t - len(whole.tokens) + len(s.tokens)]))
    assert sorted(found) == sorted(expected)
    by_place = dict(zip(expected, values, strict=True))
    mine = zip(merged.pairs.old_logprobs, merged.pairs.advantages, merged.pairs.versions, strict=True)
    assert [by_place[f] for f in found] == list(mine)
    order = list(zip(merged.pairs.token.tolist(), merged.pairs.sample.tolist(), strict=True))
    assert order == sorted(order)
    merged.forest.validate()
    assert (merged.forest.weight.numpy() > 0).nonzero()[0].tolist() == sorted(set(merged.pairs.token.tolist()))


@given(shapes, st.data())
def test_a_part_is_what_its_samples_merge_to(shape, data):
    samples = samples_of(**shape, model=MODEL)
    merged, _ = merge_samples(check(samples, MODEL), "first")
    chosen = sorted(data.draw(st.sets(st.integers(0, len(samples) - 1), min_size=1)))
    part = merged.take(np.array(chosen))
    part.forest.validate()
    anew, _ = merge_samples(check([samples[i] for i in chosen], MODEL), "first")
    assert len(part.forest) == len(anew.forest)
    assert part.lengths.tolist() == anew.lengths.tolist() == [len(samples[i].tokens) for i in chosen]
    # children may lie in another order: what comes first in the whole need not in the part
    order = {tuple(_path(part.forest, t)): t for t in range(len(part.forest))}
    place = np.array([order[tuple(_path(anew.forest, t))] for t in range(len(anew.forest))])
    for field in ("tokens", "depth", "weight", "multiplicity"):
        np.testing.assert_array_equal(getattr(part.forest, field).numpy()[place], getattr(anew.forest, field).numpy(), err_msg=field)
    assert len(part.pairs) == len(anew.pairs)
    mine, theirs = (sorted(zip(p.token.tolist(), p.sample.tolist(), p.old_logprobs, p.advantages, strict=True)) for p in (
        part.pairs, replace(anew.pairs, token=place[anew.pairs.token], sample=np.array(chosen)[anew.pairs.sample])))
    assert mine == theirs


def _path(forest, t):
    parent = int(forest.parent[t])
    return ([] if parent < 0 else _path(forest, parent)) + [int(forest.tokens[t])]


def test_context_is_merged_and_counts_for_nothing():
    parent, child = samples_of(0, 1)[:2]
    child = replace(child, parent=parent.name, trainable=np.ones(len(child.tokens), bool))
    bad = replace(parent, advantages=np.full(len(parent.tokens), np.nan, np.float32))
    merged, _ = merge_samples(check([bad, child], MODEL))
    assert len(merged.forest) == len(parent.tokens) + len(child.tokens)
    assert set(merged.forest.multiplicity.tolist()) == {1}
    assert merged.samples.tolist() == [1]
    assert set(merged.pairs.sample.tolist()) == {1}


def test_nothing_trains_nothing():
    merged, _ = merge_samples(check(samples_of(0, 3), MODEL))
    nothing = merged.nothing()
    nothing.forest.validate()
    assert (len(nothing.forest), len(nothing.pairs), nothing.forest.multiplicity.tolist()) == (1, 0, [0])
    assert nothing.forest.weight.tolist() == [0.0]
    with pytest.raises(ValueError, match="samples: empty"):
        merge_samples(Batch([], np.zeros(0, bool), np.zeros(0, np.int64), []))


def test_all_fields_of_pairs_follow_a_choice():
    merged, _ = merge_samples(check(samples_of(2, 5), MODEL))
    chosen = merged.pairs.where(np.array([3, 1]))
    for f in fields(Pairs):
        np.testing.assert_array_equal(getattr(chosen, f.name), getattr(merged.pairs, f.name)[[3, 1]])
