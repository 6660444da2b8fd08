"""Hydra composition and what it refuses: one clear line each."""

from __future__ import annotations

import pytest

from megatron_m2.train import main
from megatron_m2.training.compose import read_config


def test_overrides_reach_the_typed_fields():
    config = read_config(["model=tiny", "optim.lr=1e-2", "stage.steps=7", "stage.warmup_steps=2", "stage.decay_steps=5", "run.seed=3"])
    assert config.model.hidden_size == 64
    assert config.optim.lr == 0.01
    assert (config.stage.steps, config.run.seed) == (7, 3)
    assert config.model.rope_theta == 1e4


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.num_key_value_heads=3"], "model.num_key_value_heads = 3: must divide num_attention_heads = "),
    (["model.top_k=99"], "model.top_k = 99: more than num_experts"),
    (["model.hiden_size=64"], "hiden_size"),
    (["+model.hiden_size=64"], "model.hiden_size: unknown key; known are vocab_size"),
    (["model=m3"], "m3"),
    (["nonsense"], "nonsense"),
    (["+other.x=1"], "other: unknown group"),
    (["stage.steps=ten"], "stage.steps = 'ten': must be int"),
    (["stage.steps=1.5"], "stage.steps = 1.5: must be int"),
    (["optim.lr=fast"], "optim.lr = 'fast': must be float"),
    (["optim.lr=0"], "optim.lr = 0.0: must be positive"),
    (["run.export=3"], "run.export = 3: must be bool"),
    (["stage.decay_steps=100000"], "stage.decay_steps = 100000: must be between 0 and"),
    (["run.dtype=int8"], "run.dtype = int8: must be one of bfloat16"),
    (["run.dtype=float32", "model.fp8_experts=true"], "model.fp8_experts = True: must be false with run.dtype = float32"),
    (["run.wandb=maybe"], "run.wandb = maybe: must be offline, online or disabled"),
    (["data.seq_len=1"], "data.seq_len = 1: must be between 2 and"),
    (["~stage.steps"], "stage: missing 1 required positional argument: 'steps'"),
    (["run.device=cuda:x"], "run.device = cuda:x"),
])
def test_wrong_overrides_give_one_line(overrides, message, capsys, tmp_path):
    assert main([*overrides, f"run.dir={tmp_path}/run", f"data.path={tmp_path}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert error[0].startswith("error: ")
    assert message in error[0]


def test_cfg_prints_the_resolved_configuration(capsys):
    assert main(["--cfg", "model=tiny"]) == 0
    assert "hidden_size: 64" in capsys.readouterr().out
