"""Hugging Face checkpoints: names, round trips and block-FP8."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import megatron_m2
from megatron_m2.model import shards
from megatron_m2.model.config import ModelConfig
from megatron_m2.model.hf import config_to_hf, convert_shards, layout, load_hf, save_hf
from megatron_m2.model.m2 import M2Model
from megatron_m2.ops.fp8 import E4M3, dequantize_blocks, quantize_blocks
from tests.model.checkpoints import RELEASED, TINY, assert_same, edit_config, random_model, stored

# ---- layout -----------------------------------------------------------------------------------------------------------------------


def test_layout_of_the_release() -> None:
    slots = layout(ModelConfig())
    keys = {slot.key: slot.shape for slot in slots}
    assert len(slots) == len(keys) == 48_239  # tensors of the bf16 release
    assert sum(math.prod(s) for s in keys.values()) == 228_689_764_864
    last = "model.layers.61."
    assert keys[last + "block_sparse_moe.experts.255.w1.weight"] == keys[last + "block_sparse_moe.experts.0.w3.weight"] == (1536, 3072)
    assert keys[last + "block_sparse_moe.experts.7.w2.weight"] == (3072, 1536)
    rest = {k.removeprefix(last) for k in keys if k.startswith(last) and ".experts." not in k}
    assert rest == {"block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias", "input_layernorm.weight",
                    "post_attention_layernorm.weight", *(f"self_attn.{x}.weight" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm",
                                                                                              "k_norm"))}
    assert {k for k in keys if not k.startswith("model.layers.")} == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_experts_and_mtp_land_where_they_should(tmp_path: Path) -> None:
    model = random_model(replace(TINY, num_mtp_modules=2))
    save_hf(model, tmp_path / "hf")
    files, f = stored(tmp_path / "hf"), TINY.intermediate_size
    assert torch.equal(files["model.layers.1.block_sparse_moe.experts.3.w1.weight"], model.layers[1].moe.gate_up_proj[3, :f])
    assert torch.equal(files["model.layers.1.block_sparse_moe.experts.3.w3.weight"], model.layers[1].moe.gate_up_proj[3, f:])
    assert torch.equal(files["model.layers.0.block_sparse_moe.experts.2.w2.weight"], model.layers[0].moe.down_proj[2])
    assert torch.equal(files["model.layers.3.eh_proj.weight"], model.mtp[1].eh_proj.weight)
    assert torch.equal(files["model.layers.2.self_attn.k_norm.weight"], model.mtp[0].layer.self_attn.k_norm.weight)
    assert_same(load_hf(tmp_path / "hf"), model)


# ---- round trips ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_round_trip_is_exact_and_sharded(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(replace(TINY, num_mtp_modules=1), dtype)
    save_hf(model, tmp_path / "hf", max_shard_bytes=10_000)
    assert_same(load_hf(tmp_path / "hf"), model)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in files)
    index = json.loads((tmp_path / "hf" / shards.INDEX).read_text())
    assert sum(t.nbytes for t in stored(tmp_path / "hf").values()) == index["metadata"]["total_size"]
    for file in files:
        with safe_open(file, "pt") as shard:
            assert all(index["weight_map"][key] == file.name for key in shard.keys())  # noqa: SIM118
            assert sum(shard.get_tensor(k).nbytes for k in shard.keys()) <= 10_000 or len(list(shard.keys())) == 1  # noqa: SIM118
    assert {k: v.dtype for k, v in stored(tmp_path / "hf").items()}["model.layers.0.block_sparse_moe.gate.weight"] == \
        (torch.float64 if dtype == torch.float64 else torch.float32)


def test_dtypes_are_converted_on_the_way(tmp_path: Path) -> None:
    model = random_model()
    save_hf(model, tmp_path / "hf", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"
    narrow = megatron_m2.load(tmp_path / "hf")
    assert narrow.dtype == torch.bfloat16
    wide = megatron_m2.load(tmp_path / "hf", dtype=torch.float32)
    assert torch.equal(wide.lm_head.weight, model.lm_head.weight.bfloat16().float())
    assert torch.equal(wide.layers[0].moe.router.weight, model.layers[0].moe.router.weight)


def test_mtp_promised_but_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_hf(random_model(), tmp_path / "hf")
    edit_config(tmp_path / "hf", use_mtp=True, num_mtp_modules=3)
    with caplog.at_level(logging.INFO):
        assert load_hf(tmp_path / "hf").config.num_mtp_modules == 0
    assert [r.getMessage() for r in caplog.records if "3 MTP modules" in r.getMessage()] != []


def test_tokenizer_and_special_ids(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 1, "content": "<s>"}, {"id": 2, "content": "</s>"}]}))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    save_hf(random_model(), tmp_path / "hf", tokenizer)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    convert_shards(tmp_path / "hf", tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "again/config.json").read_text()) == config
    edit_config(tmp_path / "again", router_aux_loss_coef=0.25, bos_token_id=7, note="kept")
    convert_shards(tmp_path / "again", tmp_path / "third")
    expected = config | {"router_aux_loss_coef": 0.25, "bos_token_id": 7, "note": "kept"}
    assert json.loads((tmp_path / "third/config.json").read_text()) == expected
    convert_shards(tmp_path / "again", tmp_path / "fourth", tokenizer)
    assert json.loads((tmp_path / "fourth/config.json").read_text())["bos_token_id"] == 1
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    with pytest.raises(ValueError, match="eos_token = '<end>'"):
        save_hf(random_model(), tmp_path / "other", tokenizer)
    with pytest.raises(ValueError, match=r"nowhere/tokenizer\.json"):
        save_hf(random_model(), tmp_path / "other", tmp_path / "nowhere")


# ---- block-FP8 --------------------------------------------------------------------------------------------------------------------


def by_hand(weight: Tensor, scale: Tensor) -> Tensor:
    """Dequantises block by block, independently of the package."""
    out = torch.empty(weight.shape)
    for i in range(0, weight.shape[0], 128):
        for j in range(0, weight.shape[1], 128):
            out[i : i + 128, j : j + 128] = weight[i : i + 128, j : j + 128].to(torch.float32) * scale[i // 128, j // 128]
    return out


def released_fp8(path: Path, config: ModelConfig) -> M2Model:
    """Writes what the release looks like (random e4m3 bytes, random scales apart in another shard); gives the model it must load as."""
    generator = torch.Generator().manual_seed(4)
    model = random_model(config, torch.bfloat16)
    state = model.state_dict()
    weights, scales = {}, {}
    for slot in layout(config):
        value = slot.view(state)
        if ".experts." in slot.key or slot.key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
            weight = torch.randn(slot.shape, generator=generator).to(torch.float8_e4m3fn)
            scale = torch.rand(math.ceil(slot.shape[0] / 128), math.ceil(slot.shape[1] / 128), generator=generator) + 0.01
            value.copy_(by_hand(weight, scale))
            weights[slot.key], scales[slot.key + "_scale_inv"] = weight, scale
        else:
            weights[slot.key] = value.clone()
    path.mkdir()
    save_file(weights, path / "model-00001-of-00002.safetensors")
    save_file(scales, path / "model-00002-of-00002.safetensors")
    where = dict.fromkeys(weights, "model-00001-of-00002.safetensors") | dict.fromkeys(scales, "model-00002-of-00002.safetensors")
    (path / shards.INDEX).write_text(json.dumps({"weight_map": where}))
    (path / "config.json").write_text(json.dumps(RELEASED | {
        k: v for k, v in config_to_hf(config).items() if k in RELEASED and k not in ("use_mtp", "num_mtp_modules")}))
    return model


@pytest.mark.parametrize("hidden", [128, 136])  # a multiple of the block, and not
def test_released_fp8_equals_dequantising_by_hand(hidden: int, tmp_path: Path) -> None:
    config = replace(TINY, hidden_size=hidden, intermediate_size=260, head_dim=70, num_experts=2)
    expected = released_fp8(tmp_path / "fp8", config)
    assert_same(load_hf(tmp_path / "fp8"), expected)
    wide = load_hf(tmp_path / "fp8", torch.float32)
    files = stored(tmp_path / "fp8")
    key = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    assert torch.equal(wide.layers[1].moe.gate_up_proj[1, 260:], by_hand(files[key], files[key + "_scale_inv"]))
    # straight to bf16 without the model, in small shards
    convert_shards(tmp_path / "fp8", tmp_path / "bf16", max_shard_bytes=100_000)
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())
    assert not any(t.dtype == torch.float8_e4m3fn for t in stored(tmp_path / "bf16").values())
    assert_same(load_hf(tmp_path / "bf16"), expected)


def test_fp8_export_round_trip(tmp_path: Path) -> None:
    config = replace(TINY, hidden_size=200, num_mtp_modules=1)
    model = random_model(config, torch.bfloat16)
    save_hf(model, tmp_path / "fp8", fp8=True)
    again = load_hf(tmp_path / "fp8")
    quantised = {k.removesuffix("_scale_inv") for k in stored(tmp_path / "fp8") if k.endswith("_scale_inv")}
    assert all(("_proj" in k or ".experts." in k) and "eh_proj" not in k for k in quantised)
    assert len(quantised) == 3 * (4 + 3 * config.num_experts)
    before, after = model.state_dict(), again.state_dict()
    for slot in layout(config):
        if slot.key in quantised:  # three mantissa bits: half a step is 1/16 of the value; below the normals it is 2^-10 of the factor
            error = (slot.view(after).float() - slot.view(before).float()).abs()
            limit = slot.view(before).float().abs() * (1 / 16 + 1 / 128) + slot.view(before).float().abs().max() / 448 * 2**-10
            assert (error <= limit).all(), slot.key
        else:
            assert torch.equal(slot.view(after), slot.view(before))
    save_hf(again, tmp_path / "twice", fp8=True)
    assert_same(load_hf(tmp_path / "twice"), again)  # what was quantised once stays


def test_quantised_blocks() -> None:
    weight = torch.zeros(130, 200)
    weight[129, 199], weight[0, 0] = -7.0, 1e-20
    quantised, scale = quantize_blocks(weight)
    assert quantised.dtype == E4M3
    assert scale.tolist() == [[pytest.approx(1e-20 / 448), 1.0], [1.0, 7 / 448]]
    assert torch.equal(dequantize_blocks(quantised, scale)[129], weight[129])
    with pytest.raises(ValueError, match=r"weight_scale_inv: \[1, 2\], need \[2, 2\]"):
        dequantize_blocks(quantised, scale[:1])


@pytest.mark.parametrize(("quantization", "field"), [
    ({"quant_method": "awq"}, "quant_method"), ({"quant_method": "fp8"}, "weight_block_size"),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size")])
def test_other_quantisation_is_refused(quantization: dict[str, Any], field: str, tmp_path: Path) -> None:
    save_hf(random_model(), tmp_path / "hf")
    edit_config(tmp_path / "hf", quantization_config=quantization)
    with pytest.raises(ValueError, match=rf"config\.json: quantization_config\.{field} = "):
        load_hf(tmp_path / "hf")
