"""tools/check_vllm.py with something that answers in vLLM's place; the real one is run by hand (README)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import megatron_m2
from megatron_m2.model.config import ModelConfig
from megatron_m2.model.m2 import build_model
from tools.check_vllm import main, make_prompts, score

CONFIG = ModelConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                     rotary_dim=4, num_experts=4, top_k=2, intermediate_size=16, max_position_embeddings=256, initializer_range=0.2)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    megatron_m2.save_hf(build_model(CONFIG, torch.bfloat16, seed=0), tmp_path / "hf")
    return tmp_path / "hf"


def impostor(folder: Path, checkpoint: Path, off_by: float) -> Path:
    """An environment whose Python answers every request with our own log-probabilities of fixed tokens, ``off_by`` nats away."""
    prompts = make_prompts(checkpoint, CONFIG.vocab_size)
    answers: list[dict[str, list[float]]] = [{"tokens": [5, 7, 11], "logprobs": []} for _ in prompts]
    scored = score(megatron_m2.load(checkpoint), prompts, answers).view(-1, 3)
    for answer, logprobs in zip(answers, scored.tolist(), strict=True):
        answer["logprobs"] = [x + off_by for x in logprobs]
    (folder / "answers.json").write_text(json.dumps(answers))
    (folder / "bin").mkdir()
    script = folder / "bin/python"
    script.write_text(f"#!/bin/sh\ngrep -q max_new_tokens \"$2\" && cp {folder}/answers.json \"$3\"\n")
    script.chmod(0o755)
    return folder


@pytest.mark.parametrize(("off_by", "code"), [(0.0, 0), (0.5, 1)])
def test_within_and_beyond_the_noise(off_by: float, code: int, checkpoint: Path, tmp_path: Path,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint), "--venv", str(impostor(tmp_path, checkpoint, off_by))]) == code
    card = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert card["ok"] == (code == 0)
    assert card["vllm_vs_ours"]["mean"] == pytest.approx(off_by, abs=1e-5)
    assert 0 < card["ours_vs_fp32"]["mean"] < 0.1
    assert card["tokens"] == 24


def test_what_cannot_be_checked(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint), "--venv", str(tmp_path / "none")]) == 2
    assert "no bin/python there" in capsys.readouterr().err
    (tmp_path / "broken/bin").mkdir(parents=True)
    (tmp_path / "broken/bin/python").symlink_to(sys.executable)  # a Python without vLLM
    assert main([str(checkpoint), "--venv", str(tmp_path / "broken")]) == 2
    assert "failed with exit code 1" in capsys.readouterr().err
    assert main([str(tmp_path / "broken"), "--venv", str(tmp_path)]) == 2
