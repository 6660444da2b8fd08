"""What the planner ranks is legal, fits, adds up, and is of the size of what others published; what it refuses takes one line."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest

from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.pipeline import schedule
from megatron_m2.parallel.sharding import Sharding
from megatron_m2.planning.calibrate import compare
from megatron_m2.planning.config import read_devices, read_plan
from megatron_m2.planning.job import Layout, distinct_groups, legal
from megatron_m2.planning.memory import in_flight, stage_memory
from megatron_m2.planning.recipe import checkpoints
from megatron_m2.planning.search import search
from megatron_m2.planning.step_time import step_time

TOOLS = str(Path(__file__).parents[2] / "tools")


@pytest.fixture(scope="module")
def m2():
    return read_plan(["model=m2", "cluster=h100_256", "plan.cp=1", "plan.tokens_per_forest=8192"])


@pytest.fixture(scope="module")
def found(m2):
    return search(m2.job(), m2.device, m2.plan)


def test_plans_are_legal_and_fit_and_the_fastest_comes_first(m2, found):
    job = m2.job()
    room = m2.device.memory.value - m2.device.reserve.value
    assert len(found.plans) > 50
    for plan in found.plans:
        legal(job, plan.layout)
        assert plan.memory.total <= room
        assert plan.memory == max((stage_memory(job, plan.layout, i) for i in range(plan.layout.parallel.pp)), key=lambda m: m.total)
        assert plan.time.total == pytest.approx(sum(plan.time.seconds.values()))
        assert all(value >= 0 for value in plan.time.seconds.values())
        assert 0 < plan.time.mfu < 0.8
    times = [p.time.total for p in found.plans]
    assert times == sorted(times)
    assert len({(p.layout.parallel, p.layout.tokens_per_forest) for p in found.plans}) == len(found.plans)


def test_a_step_has_the_models_flops(m2, found):
    job, model = m2.job(), m2.model
    for plan in found.plans[:5]:
        chains = plan.time.tokens // job.seq_len
        pairs = job.seq_len * (job.seq_len + 1) // 2
        assert plan.time.flops == 3 * chains * model.forward_flops(job.seq_len, pairs, job.seq_len - 1)


@pytest.mark.parametrize(("name", "vpp"), [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero_bubble", 2), ("zbv", 2)])
@pytest.mark.parametrize("pp", [2, 4])
def test_microbatches_in_flight_are_those_of_the_schedule(name, vpp, pp):
    """Counted in the order that ranks really follow."""
    microbatches = 4 * pp
    for place, order in enumerate(schedule(name, pp, vpp, microbatches)):
        ends = "W" if any(a.kind == "W" for a in order) else "B"
        held, most, at_most = {}, 0, []
        for action in order:
            if action.kind in ("F", ends):
                held[action.stage] = held.get(action.stage, 0) + (1 if action.kind == "F" else -1)
                if sum(held.values()) > most:
                    most, at_most = sum(held.values()), sorted(held.values())
        found = in_flight(ParallelConfig(pp=pp, vpp=vpp, schedule=name), place, microbatches)
        assert sum(found) == most, (place, found, at_most)


def test_sharding_and_more_ranks_take_less_memory(m2):
    job = m2.job()
    layout = Layout(ParallelConfig(pp=8, ep=8), 8192)
    whole, one, two = (stage_memory(job, replace(layout, sharding=Sharding(zero=z)), 0) for z in (0, 1, 2))
    assert whole.optimizer > 4 * one.optimizer  # the experts', most of it, have four replicas
    assert one.optimizer == two.optimizer
    assert one.gradients > two.gradients
    wider = stage_memory(job, replace(layout, parallel=ParallelConfig(pp=8, ep=32)), 0)
    assert wider.weights < one.weights
    again = stage_memory(job, replace(layout, parallel=ParallelConfig(pp=8, ep=8, recompute=True)), 0)
    assert again.activations < one.activations / 4


def test_hiding_traffic_and_recomputing_change_the_time_the_right_way(m2):
    layout = Layout(ParallelConfig(pp=8, ep=8), 8192)
    times = {}
    for name, changes in (("plain", {}), ("hidden", {"hide_ep": 1.0, "hide_dp": 1.0}), ("uneven", {"imbalance": 2.0})):
        times[name] = step_time(replace(m2, plan=replace(m2.plan, **changes)).job(), layout, m2.device).total
    assert times["hidden"] < times["plain"] < times["uneven"]
    again = replace(layout, parallel=replace(layout.parallel, recompute=True))
    assert 1.1 < step_time(m2.job(), again, m2.device).total / times["plain"] < 1.5


def test_expected_ranks_of_a_token():
    """8 of 256 experts over 32 ranks of 8: 1 - C(248, 8) / C(256, 8) of the ranks each."""
    missed = 1.0
    for i in range(8):
        missed *= (248 - i) / (256 - i)
    assert distinct_groups(256, 8, 32) == pytest.approx(32 * (1 - missed), rel=1e-12)
    assert distinct_groups(8, 8, 8) == pytest.approx(8)


def test_checkpoint_interval_is_youngs(m2):
    saving = checkpoints(m2.model, 256, m2.device)
    assert saving.interval == pytest.approx(sqrt(2 * saving.seconds * saving.failures), rel=0.05)
    assert checkpoints(m2.model, 2048, m2.device).failures == pytest.approx(saving.failures / 8)


def test_published_runs_are_met_within_a_third():
    for c in compare(read_devices([])):
        assert 3 / 4 < c.ratio < 4 / 3, c.run.name


def test_the_tool(capsys, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    sys.modules.pop("plan", None)
    import plan as tool

    small = ["model=quickstart", "cluster=laptop", "plan.seq_len=512", "plan.batch_tokens=2048", "recipe=none"]
    assert tool.main(small) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert tool.main([*small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert tool.main(["--calibrate"]) == 0
    assert "DeepSeek-V3" in capsys.readouterr().out
    for override, message in (
            ("cluster=moon", "moon"), ("plan.tp=5", "parallel.tp = 5: must divide the attention heads, 48"),
            ("plan.schedule=best", "plan.schedule = 'best': must be one of 1f1b"), ("plan.zero=4", "plan.zero = 4: must be 0, 1 or 2"),
            ("plan.imbalance=0.5", "plan.imbalance = 0.5: must be at least 1"), ("plan.seq_len=1", "plan.seq_len = 1: must be between"),
            ("+plan.colour=red", "plan.colour: unknown key"), ("cluster.device=abacus", "cluster.device = 'abacus'")):
        assert tool.main([override]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1, error
        assert message in error[0]
