"""config.json both ways, and those of other models."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from megatron_m2.model.config import ModelConfig
from megatron_m2.model.hf_config import config_from_hf, config_to_hf
from tests.model.checkpoints import RELEASED, TINY


def test_the_released_config_is_our_default() -> None:
    assert config_from_hf(RELEASED) == ModelConfig(num_mtp_modules=3)
    for field, value in config_to_hf(ModelConfig(num_mtp_modules=3), fp8=True).items():
        if field in RELEASED and field not in ("router_aux_loss_coef", "quantization_config"):
            assert value == RELEASED[field], field


@pytest.mark.parametrize("config", [TINY, replace(TINY, num_mtp_modules=2, rope_theta=1e4), replace(TINY, head_dim=44, rotary_dim=30)])
def test_config_round_trip(config: ModelConfig) -> None:
    values = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(values) == config
    del values["rotary_dim"], values["rope_theta"]  # as transformers rewrites it
    assert config_from_hf(values) == config


def test_every_rotary_dim_survives_truncation() -> None:
    for head_dim in range(2, 257, 2):
        for rotary_dim in range(2, head_dim + 1, 2):
            factor = config_to_hf(replace(TINY, head_dim=head_dim, rotary_dim=rotary_dim))["rope_parameters"]["partial_rotary_factor"]
            assert int(head_dim * factor) == rotary_dim
            assert math.isclose(factor, rotary_dim / head_dim, rel_tol=1e-15)


def test_rope_parameters_without_a_factor_rotate_the_whole_head() -> None:
    values = config_to_hf(TINY) | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    del values["rotary_dim"], values["rope_theta"]
    assert config_from_hf(values).rotary_dim == TINY.head_dim


@pytest.mark.parametrize(("field", "value"), [
    ("model_type", "llama"), ("use_qk_norm", False), ("qk_norm_type", "per_head"), ("scoring_func", "softmax"), ("use_routing_bias", False),
    ("shared_intermediate_size", 1024), ("tie_word_embeddings", True), ("hidden_act", "gelu"), ("attention_bias", True),
    ("rope_scaling", {"type": "yarn", "factor": 4}), ("sliding_window", 4096), ("attn_type_list", [1, 0]), ("mtp_transformer_layers", 2),
    ("hidden_size", "24"), ("num_local_experts", None), ("num_experts_per_tok", True), ("rotary_dim", 6), ("rope_theta", 1.0),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}), ("num_experts_per_tok", 5), ("num_mtp_modules", -1)])
def test_config_of_another_model_is_refused(field: str, value: Any) -> None:
    ours = {"num_experts_per_tok": "num_experts_per_tok|top_k"}.get(field, field)
    with pytest.raises(ValueError, match=rf"({ours})[a-z_.]* = "):
        config_from_hf(config_to_hf(TINY) | {"use_mtp": True, field: value})


@pytest.mark.parametrize("field", ["vocab_size", "num_local_experts", "rope_theta", "rotary_dim"])
def test_missing_config_field(field: str) -> None:
    values = config_to_hf(TINY)
    for gone in (field, "rope_parameters"):
        del values[gone]
    with pytest.raises(ValueError, match=f"{field} = None: missing"):
        config_from_hf(values)
