"""A run on many ranks is the run on one: same losses, evaluation and checkpoints, and it goes on at any other layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_m2.parallel.mesh import build_mesh
from megatron_m2.training import checkpoint
from megatron_m2.training.compose import read_config
from megatron_m2.training.trainer import Trainer
from tests.parallel.ranks import on_ranks
from tests.training.conftest import overrides

STEPS = 6
SAVED = 3


def config_of(data, folder, dtype="float64", **changes):
    return read_config(overrides(data, folder, **{
        "run.dtype": dtype, "stage.steps": STEPS, "stage.warmup_steps": 1, "stage.decay_steps": 2, "stage.forests_per_step": 4,
        "model.num_hidden_layers": 3, "stage.router_bias_rate": 0.01, **changes}))


def steps(trainer, until):
    return [trainer.train_step() for _ in range(until - trainer.step)]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """One rank's metrics of every step, evaluation and final state."""
    trainer = Trainer(config_of(data, tmp_path_factory.mktemp("alone")))
    rows = steps(trainer, STEPS)
    return rows, trainer.evaluate(), {n: v.clone() for n, v in trainer.stages.state_dict().items()}


def same(row, expected, tolerance):
    for name in ("loss/lm", "loss/mtp", "loss/aux", "optim/grad_norm", "moe/bias_abs_max"):
        assert math.isclose(row[name], expected[name], rel_tol=tolerance), (name, row[name], expected[name])
    for name in ("data/tokens", "moe/max_over_mean_load", "moe/idle_experts_share", "optim/lr"):
        assert row[name] == expected[name], name


def run(config, until, expected, evaluation=None):
    trainer = Trainer(config, build_mesh(config.parallel, "cpu", config.model.num_key_value_heads))
    trainer.resume()
    expected = expected[trainer.step : until]
    for row, other in zip(steps(trainer, until), expected, strict=True):
        same(row, other, 1e-9)
    if evaluation is not None:
        for name, value in trainer.evaluate().items():
            assert math.isclose(value, evaluation[name], rel_tol=1e-9), name
    trainer.save(wait=True)


LAYOUTS = [({"pp": 2, "tp": 2}, {"cp": 2, "ep": 4}), ({"tp": 4}, {"pp": 2, "vpp": 2, "schedule": "zbv", "ep": 2}), ({"ep": 2}, {})]


@pytest.mark.parametrize(("first", "second"), LAYOUTS)
def test_half_at_one_layout_and_half_at_another(first, second, data, alone, tmp_path):
    rows, evaluation, state = alone
    on_ranks(4, run, config_of(data, tmp_path, **{f"parallel.{k}": v for k, v in first.items()}), SAVED, rows)
    second_config = config_of(data, tmp_path, **{f"parallel.{k}": v for k, v in second.items()}, **{"sharding.zero": 2})
    if second:
        on_ranks(4, run_rest, second_config, rows, evaluation)
    else:
        run_alone(second_config, rows, evaluation)
    model = checkpoint.load_model(tmp_path)
    for name, value in model.state_dict().items():
        assert float((value - state[name]).abs().max()) <= 1e-9 * float(state[name].abs().max()), name


def run_rest(config, rows, evaluation):
    run(config, STEPS, rows, evaluation)


def run_alone(config, rows, evaluation):
    trainer = Trainer(config)
    assert trainer.resume()
    assert trainer.step == SAVED
    for row, expected in zip(steps(trainer, STEPS), rows[SAVED:], strict=True):
        same(row, expected, 1e-9)
    trainer.save(wait=True)


def whole_run(config, until, other, restart):
    mesh = build_mesh(config.parallel, "cpu", config.model.num_key_value_heads)
    trainer = Trainer(config, mesh)
    assert trainer.resume() == restart
    rows = steps(trainer, until)
    trainer.save(wait=True)
    if mesh.world.rank == 0:
        torch.save([{k: v for k, v in row.items() if not k.startswith(("time", "throughput"))} for row in rows], other)


@pytest.mark.parametrize("layout", [{"pp": 2, "ep": 2}, {"cp": 2, "tp": 2}])
def test_the_same_layout_goes_on_bit_for_bit(layout, data, tmp_path):
    """In bf16, where every rounding shows."""
    changes = {f"parallel.{k}": v for k, v in layout.items()}
    through, halves = (config_of(data, tmp_path / name, "bfloat16", **changes) for name in ("through", "halves"))
    on_ranks(4, whole_run, through, STEPS, tmp_path / "through.pt", False)
    on_ranks(4, whole_run, halves, SAVED, tmp_path / "first.pt", False)
    on_ranks(4, whole_run, halves, STEPS, tmp_path / "second.pt", True)
    assert torch.load(tmp_path / "through.pt") == torch.load(tmp_path / "first.pt") + torch.load(tmp_path / "second.pt")
    one, other = (tensors(tmp_path / name) for name in ("through", "halves"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint, by name."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = checkpoint.resolve(folder)
    dcp_to_torch_save(path / "state", folder / "whole.pt")
    flat: dict[str, torch.Tensor] = {}

    def flatten(prefix, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                flatten(f"{prefix}.{key}", inner)
        else:
            flat[prefix] = value

    flatten("", torch.load(folder / "whole.pt"))
    return flat
