"""What cannot be trained is refused by sample and field; what others go on from stays as context."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from megatron_m2.forge.learner.samples import check, flatten
from tests.conftest import tiny_config
from tests.forge.learner.cases import path_of, samples_of

MODEL = tiny_config()


def good():
    (sample,) = samples_of(1, 1, length=9, model=MODEL, routed="alike")[:1]
    n = len(sample.tokens)
    return replace(sample, trainable=np.arange(n) == n - 1, advantages=np.zeros(n, np.float32), old_logprobs=np.full(n, -1, np.float32))


def changed(field, at, value):
    array = np.array(getattr(good(), field))
    array[at] = value
    return replace(good(), **{field: array})


N = len(good().tokens)
WRONG = [
    (changed("tokens", 1, 97), r"tokens\[1\] = 97: outside the vocabulary of 97"), (changed("tokens", 0, -1), r"tokens\[0\] = -1"),
    (replace(good(), tokens=np.zeros(0, np.int64)), "tokens: int64 \\[0\\]"),
    (replace(good(), tokens=good().tokens.astype(np.int32)), "tokens: int32"),
    (replace(good(), parent="nobody"), "parent: 'nobody' is no earlier sample"),
    (replace(good(), trainable=np.zeros(N, bool)), "trainable: no token to train"), (changed("trainable", 0, True), r"trainable\[0\]"),
    (replace(good(), trainable=np.ones(N - 1, bool)), rf"trainable: bool \[{N - 1}\], need bool \[{N}\]"),
    (replace(good(), old_logprobs=np.zeros(N + 1, np.float32)), rf"old_logprobs: float32 \[{N + 1}\], need float32 \[{N}\]"),
    (changed("old_logprobs", -1, np.nan), r"old_logprobs\[\d+\] = nan"),
    (changed("old_logprobs", -1, 0.5), r"old_logprobs\[\d+\] = 0.5: no"),
    (changed("old_logprobs", -1, -np.inf), r"old_logprobs\[\d+\] = -inf"),
    (changed("advantages", -1, np.nan), r"advantages\[\d+\] = nan"),
    (changed("advantages", 1, 1.0), r"advantages\[1\] = 1.0: the token is not trainable"),
    (replace(good(), advantages=np.zeros(N)), "advantages: float64"), (changed("versions", -1, -1), r"versions\[\d+\] = -1"),
    (replace(good(), reference_logprobs=np.full(N, np.nan, np.float32)), r"reference_logprobs\[\d+\] = nan"),
    (replace(good(), weight=0.0), "weight: 0.0"), (replace(good(), weight=np.inf), "weight: inf"),
    (replace(good(), routes=good().routes[..., :1]), rf"routes: int16 \[{N}, 2, 1\], need int16 \[{N}, 2, 2\]: tokens, layers, top_k"),
    (changed("routes", (1, 0), [3, 3]), r"routes\[1, 0\] = \[3, 3\]: need 2 distinct experts of 8"),
    (changed("routes", (1, 1), [3, 8]), r"routes\[1, 1\] = \[3, 8\]"), (changed("routes", (2, 1), [-1, 4]), r"routes\[2, 1\] = \[-1, 4\]"),
]


@pytest.mark.parametrize(("wrong", "reason"), WRONG, ids=[reason for _, reason in WRONG])
def test_one_is_refused_and_the_others_are_kept(wrong, reason):
    others = [replace(good(), name=name) for name in ("before", "behind")]
    batch = check([others[0], replace(wrong, name="wrong"), others[1]], MODEL)
    assert [s.name for s, context in zip(batch.samples, batch.context, strict=True) if not context] == ["before", "behind"]
    (refusal,) = batch.refusals
    assert refusal.name == "wrong"
    assert re.search(reason, refusal.reason), refusal.reason


def test_a_name_twice_a_long_path_and_a_missing_reference():
    model = replace(MODEL, max_position_embeddings=N + 2)
    child = replace(good(), name="child", parent="s0", trainable=np.ones(N, bool))
    batch = check([good(), good(), child], model)
    assert [(r.name, r.reason.split(":")[0]) for r in batch.refusals] == [("s0", "name"), ("child", "tokens")]
    assert "max_position_embeddings is" in batch.refusals[1].reason
    assert "reference_logprobs: none" in check([good()], MODEL, with_reference=True).refusals[0].reason


def test_refused_ones_stay_as_context_where_their_tokens_are_sound():
    bad = changed("old_logprobs", -1, np.nan)
    child = replace(good(), name="child", parent=bad.name)
    batch = check([bad, child], MODEL)
    assert batch.context.tolist() == [True, False]
    assert batch.parents.tolist() == [-1, 0]
    assert not batch.samples[0].trainable.any()
    assert batch.samples[0].routes is not None  # they are not what was wrong
    broken = changed("tokens", 1, 97)
    batch = check([broken, replace(child, group="other")], MODEL)
    assert batch.samples == []
    assert [r.name for r in batch.refusals] == ["s0", "child", "g0", "other"]


def test_a_group_without_a_sample_left_is_named():
    batch = check([replace(good(), weight=-1.0), replace(good(), name="a", group="else")], MODEL)
    assert [r.name for r in batch.refusals] == ["s0", "g0"]


def test_flat_samples_are_their_paths():
    samples = samples_of(5, 9, model=MODEL, routed="anyhow", parents=True)
    flat = flatten(check(samples, MODEL))
    assert (flat.parents == -1).all()
    for mine, sample in zip(flat.samples, samples, strict=True):
        whole = path_of(sample, samples)
        for field in ("tokens", "trainable", "old_logprobs", "advantages", "routes"):
            np.testing.assert_array_equal(getattr(mine, field), getattr(whole, field), err_msg=field)
