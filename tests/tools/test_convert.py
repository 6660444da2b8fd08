"""tools/convert.py: every direction, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import megatron_m2
from megatron_m2.model.config import ModelConfig
from megatron_m2.model.m2 import M2Model, build_model
from megatron_m2.training import checkpoint
from tools.convert import main

CONFIG = ModelConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                     rotary_dim=4, num_experts=4, top_k=2, intermediate_size=12, max_position_embeddings=64, num_mtp_modules=1)


@pytest.fixture
def native(tmp_path: Path) -> tuple[Path, M2Model]:
    model = build_model(CONFIG, torch.float32, seed=0)
    checkpoint.save_model(model, tmp_path / "native")
    return tmp_path / "native", model


def same(a: M2Model, b: M2Model) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left)


def test_there_and_back(native: tuple[Path, M2Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, model = native
    assert main([str(path), str(tmp_path / "hf"), "--max-shard-gib", "1e-5"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert main([str(tmp_path / "hf"), str(tmp_path / "back"), "--to", "native"]) == 0
    assert same(megatron_m2.load(tmp_path / "back"), model)


def test_dtypes_and_fp8(native: tuple[Path, M2Model], tmp_path: Path) -> None:
    path, model = native
    assert main([str(path), str(tmp_path / "bf16"), "--dtype", "bfloat16"]) == 0
    narrow = megatron_m2.load(tmp_path / "bf16")
    assert same(narrow, megatron_m2.load(path, dtype=torch.bfloat16))
    assert main([str(tmp_path / "bf16"), str(tmp_path / "fp8"), "--fp8"]) == 0
    assert main([str(tmp_path / "fp8"), str(tmp_path / "fp32"), "--dtype", "float32"]) == 0
    wide = megatron_m2.load(tmp_path / "fp32")
    assert wide.dtype == torch.float32
    assert torch.equal(wide.lm_head.weight, narrow.lm_head.weight.float())
    assert torch.equal(wide.layers[0].moe.router.weight, model.layers[0].moe.router.weight)
    torch.testing.assert_close(wide.layers[1].moe.down_proj, model.layers[1].moe.down_proj, rtol=0.08, atol=1e-4)


@pytest.mark.parametrize(("arguments", "message"), [
    (["nowhere", "out"], "nowhere: no such folder"),
    (["empty", "out"], "no checkpoint here"),
    (["native", "native"], "native: exists; give a new folder"),
    (["native", "out", "--to", "native", "--fp8"], "only for --to hf"),
    (["native", "out", "--max-shard-gib", "0"], "must be above 0"),
    (["native", "out", "--tokenizer", "nowhere"], "nowhere/tokenizer.json"),
    (["other", "out"], "other/config.json: model_type = 'llama'"),
    (["native", "file/out"], "cannot write"),
])
def test_mistakes_give_one_line(arguments: list[str], message: str, native: tuple[Path, M2Model], tmp_path: Path,
                                capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "file").write_text("")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("convert: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
