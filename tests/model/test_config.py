"""Parameter counts of the real shapes, counted from the configuration and from a built model; FLOPs; refusals."""

from __future__ import annotations

import pytest
import torch

from megatron_m2.model.config import ModelConfig
from megatron_m2.model.m2 import build_model
from megatron_m2.training.compose import read_config
from tests.conftest import tiny_config


def shipped(name: str) -> ModelConfig:
    return read_config([f"model={name}"]).model


def built_size(config: ModelConfig) -> int:
    """Weights and router biases of the model built on the meta device."""
    model = build_model(config, torch.bfloat16, "meta")
    return sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())


def test_m2_has_the_published_size():
    m2 = shipped("m2")
    assert m2 == ModelConfig(), "the defaults are M2's own"
    assert m2.num_parameters() == 228_689_764_864 == built_size(m2)
    assert m2.num_active_parameters() == 9_801_359_872
    # the report's 229.9B: two vocabulary matrices more
    assert m2.num_parameters() + 2 * m2.vocab_size * m2.hidden_size == 229_918_958_080


@pytest.mark.parametrize("name", ["ablation_17b8", "ablation_17b8_top2"])
def test_ablation_has_the_reported_size(name):
    config = shipped(name)
    assert config.num_parameters() == built_size(config)
    assert round(config.num_parameters() / 1e9, 1) == 17.8
    assert round(config.num_active_parameters() / 1e9, 1) == 2.0


@pytest.mark.parametrize("name", ["tiny", "quickstart", "bench_48m"])
def test_small_models_count_what_they_build(name):
    assert shipped(name).num_parameters() == built_size(shipped(name))


def test_both_ablations_cost_the_same():
    fine, coarse = shipped("ablation_17b8"), shipped("ablation_17b8_top2")
    assert abs(fine.num_parameters() - coarse.num_parameters()) < 1e-3 * fine.num_parameters()
    assert (coarse.num_experts, coarse.top_k, coarse.hidden_size) == (32, 2, fine.hidden_size)


def test_flops_by_torchs_own_counter(monkeypatch):
    """Against torch's count of matrix products in a real forward; a dense mask makes it count all T^2 pairs."""
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_m2.forest import TokenForest
    from megatron_m2.ops import experts

    monkeypatch.setattr(experts, "_ROW_STEP", 1)  # padding of the experts' rows is no product of the model
    config = tiny_config(num_mtp_modules=0)
    model = build_model(config, seed=0)
    forest = TokenForest.from_documents([range(50)])
    with FlopCounterMode(display=False) as counter:
        model(forest)
    attention = sum(v for k, v in counter.get_flop_counts()["Global"].items() if "attention" in str(k))
    dense_pairs = config.forward_flops(50, 50 * 50, 49)
    counted = counter.get_total_flops()
    if attention == 0:  # the CPU kernel is not in torch's table
        counted += 4 * config.q_size * 50 * 50 * config.num_hidden_layers
    assert counted == dense_pairs


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_key_value_heads": 3}, r"model.num_key_value_heads = 3: must divide num_attention_heads = 4; nearest is 2"),
    ({"top_k": 9}, r"model.top_k = 9: more than num_experts = 8; at most 8"),
    ({"rotary_dim": 7}, r"model.rotary_dim = 7: must be even and at most head_dim = 16; nearest is 8"),
    ({"rotary_dim": 32}, r"model.rotary_dim = 32: .* nearest is 16"),
    ({"hidden_size": 0}, r"model.hidden_size = 0: must be at least 1"),
    ({"fp8_experts": True, "intermediate_size": 25}, r"model.intermediate_size = 25: must be even with fp8_experts; nearest is 26"),
    ({"num_mtp_modules": -1}, r"model.num_mtp_modules = -1"),
])
def test_impossible_shapes_are_refused_with_the_nearest_legal_one(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_dictionary_round_trip():
    config = tiny_config(fp32_head=True)
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"model.n_heads: unknown field"):
        ModelConfig.from_dict({"n_heads": 4})
