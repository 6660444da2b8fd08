"""Fixtures shared by the tests; each test that needs data or a model makes a small one."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# The tensors here are tiny: a second thread only waits, and starves whatever else runs on the machine.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from hypothesis import settings

from megatron_m2.forest import TokenForest, merge_samples
from megatron_m2.model.config import ModelConfig
from megatron_m2.ops import _extension

# Examples are drawn the same way every time, and a slow shared machine is no failure.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("repeatable")


needs_kernels = pytest.mark.skipif(not _extension.available(), reason="megatron_m2._C is not built (no C++ compiler)")


def tiny_config(**changes) -> ModelConfig:
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 16, "rotary_dim": 8, "rope_theta": 1e4, "max_position_embeddings": 512, "num_experts": 8, "top_k": 2,
             "intermediate_size": 24, "initializer_range": 0.1}
    return ModelConfig(**{**shape, **changes})


def random_samples(seed: int, count: int = 5, vocab: int = 97, length: int = 9, branching: int = 3) -> list[list[int]]:
    """Samples that share prefixes: each goes on from a random cut of an earlier one."""
    rng = np.random.default_rng(seed)
    samples: list[list[int]] = []
    for _ in range(count):
        prefix: list[int] = []
        if samples and rng.integers(branching):
            other = samples[rng.integers(len(samples))]
            prefix = other[: rng.integers(1, len(other) + 1)]
        samples.append(prefix + rng.integers(0, vocab, rng.integers(1, length)).tolist())
    return samples


def random_forest(seed: int, **kind) -> TokenForest:
    return merge_samples(random_samples(seed, **kind))[0]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))
