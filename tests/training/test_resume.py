"""A run that is killed again and again ends like one that never was: weights, optimizer, metrics, bit for bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from megatron_m2.train import TERMINATED, main
from megatron_m2.training import checkpoint
from megatron_m2.training.compose import read_config
from megatron_m2.training.metrics import MACHINE_PREFIXES, read_metrics
from megatron_m2.training.trainer import Trainer
from tests.training.conftest import overrides

STEPS = 40


def final_state(arguments: list[str]) -> dict[str, torch.Tensor]:
    trainer = Trainer(read_config(arguments))
    assert trainer.resume()
    assert trainer.step == trainer.config.stage.steps
    flat = {f"model.{n}": v for n, v in trainer.stages.state_dict().items()}
    flat |= {f"{n}.{k}": v for n, values in trainer.optimizer.state_dict().items() for k, v in values.items()}
    return flat | {"rng": torch.get_rng_state(), "stream": torch.tensor(list(str(trainer.stream.state_dict()).encode()))}


def repeatable(folder) -> list[dict[str, float]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(MACHINE_PREFIXES)} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    arguments = overrides(data, folder, **{"stage.steps": STEPS})
    assert main(arguments) == 0
    return repeatable(folder), final_state(arguments)


def assert_equal_to(undisturbed, folder, arguments):
    rows, state = undisturbed
    assert repeatable(folder) == rows
    mine = final_state(arguments)
    assert mine.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(mine[name], value), name


def start(arguments):
    command = [sys.executable, "-m", "megatron_m2.train", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for_a_new_row(process, folder, rows):
    while process.poll() is None and len(read_metrics(folder / "metrics.jsonl")) <= rows:
        time.sleep(0.002)


def test_ten_kills_at_random_moments(undisturbed, data, tmp_path):
    arguments = overrides(data, tmp_path, **{"stage.steps": STEPS})
    rng = random.Random(1)
    kills = 0
    while kills < 10:
        process = start(arguments)
        done = checkpoint.checkpoints(tmp_path / "checkpoints")
        wait_for_a_new_row(process, tmp_path, int(done[-1].name[-8:]) if done else 0)
        time.sleep(rng.random() * 0.12)  # some four steps, every second of which saves
        process.kill()
        status = process.wait()
        if status == 0:
            pytest.fail(f"the run ended before ten kills (after {kills}): make it longer")
        assert status == -signal.SIGKILL, process.stderr.read()
        kills += 1
        for found in checkpoint.checkpoints(tmp_path / "checkpoints"):
            checkpoint.verify(found)
    last = start(arguments)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert_equal_to(undisturbed, tmp_path, arguments)


def test_sigterm_saves_the_step_it_is_at(undisturbed, data, tmp_path):
    arguments = overrides(data, tmp_path, **{"stage.steps": STEPS, "run.save_every": 0})
    process = start(arguments)
    wait_for_a_new_row(process, tmp_path, 5)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == TERMINATED, errors
    assert "stopped by SIGTERM after step" in errors
    saved = checkpoint.checkpoints(tmp_path / "checkpoints")
    assert len(saved) == 1
    assert int(saved[0].name[-8:]) == read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] >= 6
    assert main(arguments) == 0
    assert_equal_to(undisturbed, tmp_path, arguments)


def test_a_complete_run_only_reports(undisturbed, data, tmp_path, capsys):
    arguments = overrides(data, tmp_path, **{"stage.steps": STEPS})
    assert main(arguments) == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    first = capsys.readouterr().out
    assert main(arguments) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert capsys.readouterr().out == first
    assert "held-out bits per byte" in first


def test_a_run_folder_of_another_model_is_refused(undisturbed, data, tmp_path, capsys):
    assert main(overrides(data, tmp_path, **{"stage.steps": 2, "stage.warmup_steps": 0, "stage.decay_steps": 0})) == 0
    capsys.readouterr()
    assert main(overrides(data, tmp_path, **{"model.top_k": 3})) == 2
    assert "is of another model: top_k = 2, configured 3" in capsys.readouterr().err
