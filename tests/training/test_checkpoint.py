"""Checkpoints: exact round trip, atomic under failure, damage and strangers refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import megatron_m2
from megatron_m2.model.m2 import build_model
from megatron_m2.training import checkpoint
from megatron_m2.training.checkpoint import CheckpointError
from tests.conftest import tiny_config


@pytest.fixture
def saved(tmp_path):
    model = build_model(tiny_config(num_mtp_modules=1), torch.bfloat16, seed=4)
    return model, checkpoint.save_model(model, tmp_path / "run")


def test_round_trip_is_exact(saved):
    model, path = saved
    for source in (path, path.parent):
        loaded = megatron_m2.load(source)
        assert loaded.config == model.config
        for name, value in model.state_dict().items():
            assert loaded.state_dict()[name].dtype == value.dtype
            assert torch.equal(loaded.state_dict()[name], value), name


def test_loading_in_another_dtype_converts_all_but_the_router(saved):
    model, path = saved
    wide = megatron_m2.load(path, dtype=torch.float32)
    assert wide.lm_head.weight.dtype == torch.float32
    assert torch.equal(wide.lm_head.weight, model.lm_head.weight.float())
    half = megatron_m2.load(path, dtype=torch.float16)
    assert half.layers[0].moe.router.weight.dtype == torch.float32


def test_nested_state_and_trainer_values_come_back(tmp_path):
    state = {"a": {"x": torch.arange(5), "y": torch.tensor(2.5)}, "rng": torch.get_rng_state()}
    path = checkpoint.save(tmp_path, 7, tiny_config(), state, {"stream": {"position": 3}})
    empty = {"a": {"x": torch.zeros(5, dtype=torch.int64), "y": torch.tensor(0.0)}, "rng": torch.zeros_like(state["rng"])}
    assert checkpoint.load(path, empty) == {"step": 7, "stream": {"position": 3}}
    assert torch.equal(empty["a"]["x"], state["a"]["x"])
    assert float(empty["a"]["y"]) == 2.5
    assert torch.equal(empty["rng"], state["rng"])


def test_only_the_newest_are_kept_and_half_written_ones_removed(tmp_path):
    (tmp_path / ".writing-00000001").mkdir()
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tiny_config(), {"x": torch.ones(1)}, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    assert checkpoint.resolve(tmp_path).name == "step_00000003"


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """A real write failure: a file-size limit below the tensors' size, in a process of its own."""
    checkpoint.save(tmp_path, 1, tiny_config(), {"x": torch.ones(4)}, {})
    program = f"""
import resource, signal, sys, torch
from megatron_m2.training import checkpoint
from megatron_m2.model.config import ModelConfig
config = checkpoint.read_config({str(tmp_path / "step_00000001")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save({str(tmp_path)!r}, 2, config, {{"x": torch.ones(1_000_000)}}, {{}})
except checkpoint.CheckpointError as error:
    print(error); sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith(f"cannot save {tmp_path / 'step_00000002'}: ")
    assert len(done.stdout.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    checkpoint.verify(tmp_path / "step_00000001")


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_damage_is_named(saved, damage):
    _, path = saved
    victim = next((path / "state").glob("*.distcp"))
    if damage == "truncate":
        os.truncate(victim, victim.stat().st_size - 1)
    elif damage == "remove":
        victim.unlink()
    else:
        (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"is damaged: state/|no complete checkpoint") as caught:
        megatron_m2.load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_another_models_tensors_are_refused(saved, tmp_path):
    _, path = saved
    other = build_model(tiny_config(hidden_size=48), torch.bfloat16, seed=0)
    with pytest.raises(CheckpointError, match=f"cannot load {path}"):
        checkpoint.load(path, {"model": other.state_dict()})
    config = json.loads((path / "model_config.json").read_text())
    (path / "model_config.json").write_text(json.dumps({**config, "n_heads": 3}))
    with pytest.raises(CheckpointError, match=r"model_config.json: ValueError: model.n_heads: unknown field"):
        checkpoint.read_config(path)


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        megatron_m2.load(tmp_path)


def test_saving_the_same_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, 1, tiny_config(), {"x": torch.ones(1)}, {})
    checkpoint.save(tmp_path, 1, tiny_config(), {"x": torch.full((1,), 2.0)}, {})
    state = {"x": torch.zeros(1)}
    checkpoint.load(tmp_path / "step_00000001", state)
    assert float(state["x"]) == 2.0
