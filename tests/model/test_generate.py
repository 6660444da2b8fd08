"""Generation with a cache against recomputing everything, sampling parameters, refusals."""

from __future__ import annotations

import pytest
import torch

from megatron_m2.model.generate import _sample, generate, logits
from megatron_m2.model.m2 import build_model
from tests.conftest import tiny_config


@pytest.fixture(scope="module")
def model():
    return build_model(tiny_config(), torch.float64, seed=2)


def test_greedy_equals_recomputing_without_a_cache(model):
    prompt = torch.randint(0, 97, (3, 5))
    expected = prompt
    for _ in range(8):
        expected = torch.cat([expected, logits(model, expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(model, prompt, 8, temperature=0), expected)


def test_logits_are_fp32_of_the_right_shape():
    bf16 = build_model(tiny_config(), torch.bfloat16, seed=2)
    out = logits(bf16, torch.randint(0, 97, (2, 4)))
    assert (out.shape, out.dtype) == ((2, 4, 97), torch.float32)


def test_the_same_seed_repeats_and_another_differs(model):
    prompt = torch.randint(0, 97, (2, 3))
    first, second, other = (generate(model, prompt, 20, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_after_eos_a_sequence_is_filled_and_all_done_ends_early(model):
    prompt = torch.randint(0, 97, (2, 3))
    eos = int(generate(model, prompt, 1, temperature=0)[0, -1])
    out = generate(model, prompt, 30, temperature=0, eos_id=eos)
    after = out[0, 3:]
    assert (after == eos).all()
    assert generate(model, prompt[:1], 30, temperature=0, eos_id=eos).shape[1] == 4


def test_top_k_and_top_p_keep_what_they_say():
    row = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().repeat(4000, 1)
    g = torch.Generator().manual_seed(0)
    assert set(_sample(row, 1.0, 2, 1.0, g).flatten().tolist()) == {0, 1}
    assert set(_sample(row, 1.0, None, 0.74, g).flatten().tolist()) == {0, 1}
    assert set(_sample(row, 1.0, None, 0.76, g).flatten().tolist()) == {0, 1, 2}
    assert set(_sample(row, 1.0, None, 1e-9, g).flatten().tolist()) == {0}
    share = (_sample(row, 1.0, None, 1.0, g) == 0).double().mean()
    assert abs(float(share) - 0.5) < 0.03
    cold = (_sample(row, 0.5, None, 1.0, g) == 0).double().mean()
    assert abs(float(cold) - 0.25 / (0.25 + 0.0625 + 0.0225 + 0.01)) < 0.03


def test_bad_arguments_are_named(model):
    with pytest.raises(ValueError, match=r"tokens: id 97 outside"):
        logits(model, torch.tensor([[97]]))
    with pytest.raises(ValueError, match=r"tokens: torch.int32"):
        logits(model, torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"tokens: torch.int64 \[3\]"):
        generate(model, torch.zeros(3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="top_p"):
        generate(model, torch.zeros(1, 2, dtype=torch.int64), 2, top_p=0)
    with pytest.raises(ValueError, match="513 positions, max_position_embeddings = 512"):
        generate(model, torch.zeros(1, 510, dtype=torch.int64), 9)
