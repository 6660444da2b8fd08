"""Shapes without weights are those of real runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron_m2.forest import TokenForest
from megatron_m2.model.m2 import build_model
from megatron_m2.planning.dry_run import dry_run
from megatron_m2.planning.shapes import drawn_routes, saved_bytes
from megatron_m2.training.compose import read_config
from tests.conftest import needs_kernels

TOOLS = str(Path(__file__).parents[2] / "tools")
SMALL = ["model=tiny", "model.num_hidden_layers=5", "data.seq_len=48", "data.tokens_per_forest=96", "data.path=none",
         "stage=m2_constant", "stage.forests_per_step=16"]

pytestmark = needs_kernels


@pytest.mark.parametrize("parallel", [
    ["parallel.pp=2"], ["parallel.pp=3", "parallel.tp=2", "parallel.ep=4", "parallel.recompute=true"],
    ["parallel.pp=2", "parallel.vpp=2", "parallel.schedule=zbv", "parallel.cp=2", "parallel.ep=2"],
    ["parallel.tp=3", "model.vocab_size=512", "model.num_attention_heads=3", "model.num_key_value_heads=3"]])
def test_all_ranks_together_hold_the_model(parallel):
    config = read_config([*SMALL, *parallel])
    world = config.parallel.pp * config.parallel.tp * config.parallel.cp * 4
    reports = list(dry_run(config, world))
    assert sum(r.alike for r in reports) == world
    wholes = {name: size for r in reports for name, size in r.wholes.items()}
    assert sum(wholes.values()) == config.model.num_parameters()
    for r in reports:
        assert all(r.parameters[name] <= wholes[name] for name in r.parameters)
        assert r.held >= max(r.saved.values())
        assert (r.transient > 0) == config.parallel.recompute
        assert ("ep", "all-to-all") in r.calls or config.parallel.ep == 1


def test_saved_bytes_are_those_of_a_real_forward():
    config = read_config([*SMALL, "run.dtype=bfloat16"])
    (report,) = dry_run(config, 1)
    model = build_model(config.model, torch.bfloat16, seed=0)
    weights = {p.untyped_storage()._cdata for p in model.state_dict(keep_vars=True).values()}
    forest = TokenForest.from_documents([torch.randint(0, 97, (48,)).numpy() for _ in range(2)])
    with saved_bytes(lambda t: t.untyped_storage()._cdata in weights) as kept:
        model(forest)
    # routes are drawn in the one and learnt in the other: experts' groups are padded to other multiples of 16 rows
    assert report.saved[0] == pytest.approx(kept[0], rel=0.1)
    assert report.weight_bytes == sum(v.numel() * v.itemsize for v in model.state_dict().values())


def test_drawn_routes_are_distinct_and_even():
    routes = drawn_routes(4096, 8, 64)
    assert all(len(set(chosen)) == 8 for chosen in routes.tolist())
    counts = torch.bincount(routes.flatten().long(), minlength=64)
    assert counts.min() > 400
    assert counts.max() < 630
    assert torch.equal(routes, drawn_routes(4096, 8, 64))


def test_the_tool_prints_every_rank_and_refuses_in_one_line(capsys, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    sys.modules.pop("dry_run", None)
    import dry_run as tool

    assert tool.main(["--world", "8", *SMALL, "parallel.pp=2", "parallel.ep=2"]) == 0
    out = capsys.readouterr().out
    assert out.count("per forest") == 2
    assert f"all ranks together: {read_config(SMALL).model.num_parameters():,} parameters" in out
    assert tool.main(["--world", "9", *SMALL, "parallel.pp=2"]) == 2
    assert capsys.readouterr().err == ("error: parallel: pp x cp x tp = 2 x 1 x 1 = 2 must divide the 9 ranks; "
                                       "nearest number of ranks is 8\n")
