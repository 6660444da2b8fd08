"""scripts/train.sh: what is wrong is said in one line before any rank starts; what is right arrives at the ranks."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_m2.train import main
from tests.training.conftest import data, overrides  # noqa: F401 (data is a fixture)

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train.sh"

# ranks, overrides of a run that is right otherwise, the line
WRONG = [
    (2, {"parallel.tp": 3}, "parallel.tp = 3: must divide the attention heads, 4; nearest is 2"),
    (8, {"parallel.tp": 8}, "parallel.tp = 8: must divide the attention heads, 4; nearest is 4"),
    (6, {"model.num_attention_heads": 6, "model.num_key_value_heads": 2, "parallel.tp": 3},
     "parallel.tp = 3: must divide the 2 key/value heads or be a multiple of them; nearest is 2"),
    (4, {"parallel.ep": 3}, "parallel.ep = 3: must divide the experts, 8; nearest is 2"),
    (4, {"parallel.ep": 8}, "parallel.ep = 8: must divide dp x cp x tp = 4 x 1 x 1 = 4; nearest is 4"),
    (6, {"parallel.pp": 2, "parallel.ep": 4, "stage.forests_per_step": 3},
     "parallel.ep = 4: must divide dp x cp x tp = 3 x 1 x 1 = 3; nearest is 1"),
    (4, {"parallel.pp": 4}, "parallel.pp = 4: pp x vpp = 4 stages for 2 layers and the head; at most 3"),
    (2, {"parallel.pp": 2, "parallel.vpp": 2, "parallel.schedule": "interleaved"},
     "parallel.vpp = 2: pp x vpp = 4 stages for 2 layers and the head; at most 1"),
    (2, {"parallel.pp": 2, "parallel.vpp": 2}, "parallel.vpp = 2: with pp = 2 and schedule = 1f1b, nearest is 1"),
    (2, {"parallel.pp": 2, "parallel.schedule": "zbv"}, "parallel.vpp = 1: with pp = 2 and schedule = zbv, nearest is 2"),
    (1, {"parallel.vpp": 2}, "parallel.vpp = 2: with pp = 1 and schedule = 1f1b, nearest is 1"),
    (2, {"parallel.schedule": "gpipe"}, "parallel.schedule = gpipe: must be one of 1f1b, interleaved, zero_bubble, zbv"),
    (3, {"parallel.cp": 2}, "parallel: pp x cp x tp = 1 x 2 x 1 = 2 must divide the 3 ranks; nearest number of ranks is 4"),
    (12, {"parallel.pp": 2, "parallel.cp": 2, "parallel.tp": 4},
     "parallel: pp x cp x tp = 2 x 2 x 4 = 16 must divide the 12 ranks; nearest number of ranks is 16"),
    (1, {"parallel.cp": 0}, "parallel.cp = 0: must be at least 1"),
    (1, {"parallel.tp": "two"}, "parallel.tp = 'two': must be int"),
    (1, {"parallel.ep": 1.5}, "parallel.ep = 1.5: must be int"),
    (1, {"parallel.timeout_s": 0}, "parallel.timeout_s = 0.0: must be positive"),
    (1, {"parallel.recompute": "maybe"}, "parallel.recompute = 'maybe': must be bool"),
    (4, {}, "stage.forests_per_step = 2: must be a multiple of dp = 4; nearest is 4"),
    (512, {"parallel.cp": 512, "stage.forests_per_step": 1}, "data.tokens_per_forest = 256: fewer than cp x tp = 512; at least 512"),
    (2, {"model.num_hidden_layers": 3, "parallel.pp": 2, "parallel.vpp": 2, "parallel.schedule": "interleaved",
         "stage.forests_per_step": 5},
     "stage.forests_per_step = 5: interleaved runs 2 rounds, which must divide the 5 forests per dp rank; nearest is 4"),
    (1, {"stage.steps": 0}, "stage.steps = 0: must be at least 1"),
    (1, {"stage.decay_steps": 100}, "stage.decay_steps = 100: must be between 0 and steps - warmup_steps = 20"),
    (1, {"optim.lr": "fast"}, "optim.lr = 'fast': must be float"),
    (1, {"run.dtype": "int8"}, "run.dtype = int8: must be one of bfloat16, float32, float64"),
    (1, {"model.top_k": 9}, "model.top_k = 9: more than num_experts"),
    (1, {"model.vocab_size": 300}, "model.vocab_size = 300: "),
    (1, {"data.path": "/nowhere"}, "data.path = /nowhere: no manifest.json here"),
    (1, {"data.blend.prose": -1}, "data.blend.prose = -1.0: must be at least 0 and finite"),
    (1, {"run.device": "tpux"}, "run.device = tpux: "),
    (1, {"parallel.dq": 2}, "dq"),
    (1, {"+parallel.dq": 2}, "parallel.dq: unknown key; known are pp, cp, tp"),
]


@pytest.mark.parametrize(("world", "changes", "line"), WRONG, ids=[line[:50] for _, _, line in WRONG])
def test_what_is_wrong_gives_one_line_before_any_process_starts(world, changes, line, data, tmp_path, capsys):  # noqa: F811
    assert main(["--check", str(world), *overrides(data, tmp_path / "run", **changes)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (error,) = output.err.splitlines()
    assert error.startswith("error: ")
    assert line in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("world", "changes"), [(1, {}), (2, {"parallel.tp": 2}), (4, {"parallel.pp": 2, "parallel.ep": 2})])
def test_what_is_right_passes_in_silence(world, changes, data, tmp_path, capsys):  # noqa: F811
    assert main(["--check", str(world), *overrides(data, tmp_path / "run", **changes)]) == 0
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there(data, tmp_path, capsys):  # noqa: F811
    if torch.cuda.is_available():
        pytest.skip("this machine has the GPU that the test needs to be absent")
    assert main(["--check", "1", *overrides(data, tmp_path / "run", **{"run.device": "cuda"})]) == 2
    assert "error: run.device = cuda: " in capsys.readouterr().err


# ---- the script itself -------------------------------------------------------------------------------------------------------------


def launch(tmp_path: Path, arguments: list[str], **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs the script; returns what it printed and the Python programs that it started."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/started\nexec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=300,
                          env={**os.environ, "PYTHON": str(python), **environment})
    started = (tmp_path / "started").read_text().splitlines() if (tmp_path / "started").exists() else []
    return done, started


@pytest.mark.parametrize(("environment", "line"), [
    ({"NPROC": "0"}, "NPROC = 0: must be a whole number, nearest is 1"),
    ({"NPROC": "two"}, "NPROC = two: must be a whole number, nearest is 1"),
    ({"NNODES": "1:4"}, "NNODES = 1:4: must be a whole number, nearest is 1"),
    ({"NNODES": "2", "MASTER_ADDR": "10.0.0.1", "NODE_RANK": "2"}, "NODE_RANK = 2: must be below NNODES = 2; nearest is 1"),
    ({"NNODES": "2"}, "MASTER_ADDR = : must be the address of node 0 when NNODES = 2"),
    ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS = -1: must be a whole number, nearest is 0"),
])
def test_wrong_variables_give_one_line(environment, line, tmp_path):
    done, started = launch(tmp_path, [], **environment)
    assert (done.returncode, done.stdout, done.stderr, started) == (2, "", f"error: {line}\n", [])


def test_a_wrong_layout_starts_no_rank(data, tmp_path):  # noqa: F811
    done, started = launch(tmp_path, overrides(data, tmp_path / "run", **{"parallel.tp": 3}), NPROC="2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: parallel.tp = 3: must divide the attention heads, 4; nearest is 2\n"
    assert [s.partition(" model=")[0] for s in started] == ["-m megatron_m2.train --check 2"]
