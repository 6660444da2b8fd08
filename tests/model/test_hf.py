"""Hugging Face checkpoints: names, config.json, block-FP8, sharding, and what happens to bad ones and full disks."""

from __future__ import annotations

import errno
import json
import logging
import math
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import megatron_m2
from megatron_m2.model import shards
from megatron_m2.model.config import ModelConfig
from megatron_m2.model.fp8 import E4M3, dequantize_blocks, quantize_blocks
from megatron_m2.model.hf import config_from_hf, config_to_hf, convert_shards, layout, load_hf, save_hf
from megatron_m2.model.m2 import M2Model, build_model

TINY = ModelConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                   rotary_dim=4, num_experts=4, top_k=2, intermediate_size=12, max_position_embeddings=64)
RELEASED = {  # MiniMax-M2's own config.json
    "architectures": ["MiniMaxM2ForCausalLM"], "attn_type_list": [1] * 62, "bos_token_id": None, "eos_token_id": None, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 1536, "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 196608, "mlp_intermediate_size": 8192, "model_type": "minimax_m2", "mtp_transformer_layers": 1,
    "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8, "num_local_experts": 256,
    "num_mtp_modules": 3, "output_router_logits": False, "qk_norm_type": "per_layer", "rms_norm_eps": 1e-06, "rope_theta": 5000000,
    "rotary_dim": 64, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "scoring_func": "sigmoid", "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid", "sliding_window": None, "tie_word_embeddings": False, "use_mtp": True, "use_qk_norm": True,
    "use_routing_bias": True, "vocab_size": 200064,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "float8_e4m3fn", "quant_method": "fp8", "weight_block_size": [128, 128],
                            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}}


def random_model(config: ModelConfig = TINY, dtype: torch.dtype = torch.float32, seed: int = 0) -> M2Model:
    model = build_model(config, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def assert_same(a: M2Model, b: M2Model) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def stored(path: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


# ---- config.json ------------------------------------------------------------------------------------------------------------------


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


# ---- damage -----------------------------------------------------------------------------------------------------------------------

KEY = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / shards.SINGLE)
    change(tensors)
    save_file(tensors, path / shards.SINGLE)


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop(KEY), f"tensor {KEY} is missing"),
    (lambda t: t.update(stray=torch.zeros(1)), r"model\.safetensors: unexpected tensor stray"),
    (lambda t: t.update({KEY: t[KEY][:, :-1].contiguous()}), rf"{KEY} is \[24, 11\], config.json asks for \[24, 12\]"),
    (lambda t: t.update({KEY: t[KEY].to(torch.int8)}), f"{KEY} is I8; readable are"),
    (lambda t: t.update({KEY: t[KEY].to(E4M3)}), f"tensor {KEY}_scale_inv is missing"),
    (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(E4M3), "model.norm.weight_scale_inv": torch.ones(1, 1)}),
     r"model\.norm\.weight is FP8"),
    (lambda t: t.update({f"model.layers.2.{k.split('.', 3)[3]}": v.clone() for k, v in t.items() if k.startswith("model.layers.1.")}),
     r"unexpected tensor model\.layers\.2\..*asks for 2 layers, 4 experts and 0 MTP"),
])
def test_bad_tensors(change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path) -> None:
    save_hf(random_model(), tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda tensors: change(tensors))
    with pytest.raises(ValueError, match=message):
        load_hf(tmp_path / "hf")


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "hf"
    save_hf(random_model(), path, max_shard_bytes=10_000)
    first = sorted(path.glob("*.safetensors"))[0]
    whole, index = first.read_bytes(), (path / shards.INDEX).read_text()

    first.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{first.name}: damaged or truncated"):
        load_hf(path)
    first.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{first.name}: damaged or truncated"):
        load_hf(path)
    first.unlink()
    with pytest.raises(ValueError, match=rf"{first.name}: missing"):
        load_hf(path)
    first.write_bytes(whole)
    save_file({KEY: torch.zeros(1)}, path / "extra.safetensors")
    (path / shards.INDEX).write_text(json.dumps({"weight_map": json.loads(index)["weight_map"] | {"stray": "extra.safetensors"}}))
    with pytest.raises(ValueError, match=f"extra.safetensors: holds {KEY}, and so does|model-.*: holds {KEY}, and so does extra"):
        load_hf(path)
    (path / shards.INDEX).write_text(json.dumps({"weight_map": json.loads(index)["weight_map"] | {"stray": first.name}}))
    with pytest.raises(ValueError, match=f"puts stray in {first.name}"):
        load_hf(path)
    for text in ("{", "[]", '{"weight_map": 3}'):
        (path / shards.INDEX).write_text(text)
        with pytest.raises(ValueError, match=r"index\.json: "):
            load_hf(path)
    (path / shards.INDEX).unlink()
    with pytest.raises(ValueError, match="neither"):
        load_hf(path)
    edit_config(path, model_type="llama")
    with pytest.raises(ValueError, match=r"config\.json: model_type = 'llama'"):
        megatron_m2.load(path)
    (path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        load_hf(path)


# ---- full disks and kills ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Any:
    """The kernel refuses files beyond 16 KiB, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, small_files: Callable[[], None]) -> None:
    model = random_model()
    small_files()
    with pytest.raises(ValueError, match=rf"cannot write {tmp_path}/hf: .*; nothing of it was kept") as caught:
        save_hf(model, tmp_path / "hf")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hf(random_model(), tmp_path / "hf")
    written: list[Path] = []

    def full(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        written.append(file)
        save_file(tensors, file, metadata)

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left on device"):
        save_hf(random_model(seed=1), tmp_path / "hf", max_shard_bytes=10_000)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert_same(load_hf(tmp_path / "hf"), random_model())


def test_an_interrupt_cleans_up_and_a_kill_is_cleaned_up_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shards, "save_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            save_hf(random_model(), tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []
    save_hf(random_model(), tmp_path / ".hf.replaced")  # killed between the two renames
    (tmp_path / ".hf.writing").mkdir()
    small = random_model(seed=1)
    with shards.complete_folder(tmp_path / "hf"):
        assert_same(load_hf(tmp_path / "hf"), random_model())
        assert not (tmp_path / ".hf.replaced").exists()
    save_hf(small, tmp_path / "hf")
    assert_same(load_hf(tmp_path / "hf"), small)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    save_hf(random_model(), tmp_path / "hf")  # an empty folder is fine
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter").write_text("1")
    with pytest.raises(ValueError, match="exists and is no Hugging Face checkpoint"):
        save_hf(random_model(), tmp_path / "thesis")
    assert (tmp_path / "thesis/chapter").read_text() == "1"
