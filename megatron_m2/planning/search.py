"""All layouts of a job that are legal and fit, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.sharding import Sharding
from megatron_m2.planning.cluster import Device
from megatron_m2.planning.config import PlanConfig
from megatron_m2.planning.job import Job, Layout, legal
from megatron_m2.planning.memory import Memory, peak_memory
from megatron_m2.planning.step_time import StepTime, step_time

_MOST_VPP, _MOST_CHAINS = 8, 8
_LEAST_TOKENS = 1024  # of a forest on one rank, for more parts of it to be tried


@dataclass(frozen=True)
class Plan:
    """A layout with its cost.

    Attributes:
        stage: the pipeline stage that needs the most memory; memory: of its fullest rank.
    """

    layout: Layout
    stage: int
    memory: Memory
    time: StepTime


@dataclass
class Found:
    """What a search came to.

    Attributes:
        plans: that fit, the fastest first.
        refused: number of combinations of axes and microbatch that the validator refused, by the field it named first.
        too_large: number of legal ones that do not fit in any way; smallest: the one of them that comes closest.
    """

    plans: list[Plan] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    too_large: int = 0
    smallest: tuple[Layout, Memory] | None = None


def search(job: Job, device: Device, plan: PlanConfig) -> Found:
    """Tries every layout that ``plan`` leaves open. What it leaves to the search keeps tensor parallelism within a node and 1,024 tokens
    of a forest on every rank.

    Raises:
        ValueError: nothing is legal; with all axes given, why.
    """
    found, reason = Found(), ""
    room = int(device.memory.value - device.reserve.value)
    for layout in _candidates(job, plan):
        try:
            legal(job, layout)
        except ValueError as error:
            reason = reason or str(error)
            name = str(error).split(" ")[0].rstrip(":")
            found.refused[name] = found.refused.get(name, 0) + 1
            continue
        fits = _fastest_that_fits(job, layout, plan, room, found)
        if fits is None:
            found.too_large += 1
        else:
            found.plans.append(Plan(*fits, step_time(job, fits[0], device)))
    if not found.plans and not found.too_large:
        raise ValueError(f"no legal layout: {reason}")
    found.plans.sort(key=lambda p: p.time.total)
    return found


def _fastest_that_fits(job: Job, layout: Layout, plan: PlanConfig, room: int, found: Found) -> tuple[Layout, int, Memory] | None:
    """Neither recomputation nor sharded gradients make a step faster: the first of these that fits, in the order of their cost."""
    recompute = (False, True) if plan.recompute is None else (plan.recompute,)
    zero = (1, 2) if plan.zero is None else (plan.zero,)
    for z in zero:
        for r in recompute:
            tried = replace(layout, parallel=replace(layout.parallel, recompute=r), sharding=Sharding(zero=z))
            stage, memory = peak_memory(job, tried)
            if memory.total <= room:
                return tried, stage, memory
            if found.smallest is None or memory.total < found.smallest[1].total:
                found.smallest = tried, memory
    return None


def _candidates(job: Job, plan: PlanConfig) -> Iterator[Layout]:
    m, ranks = job.model, job.cluster.ranks
    sizes = _divisors(ranks)
    chains = [2**i for i in range(_MOST_CHAINS.bit_length())]
    tokens = _choice(plan.tokens_per_forest, [c * job.seq_len for c in chains if c * job.seq_len <= job.batch_tokens])
    for pp in _choice(plan.pp, [n for n in sizes if n <= m.num_hidden_layers]):
        for tp in _choice(plan.tp, [n for n in sizes if n <= job.cluster.gpus_per_node]):
            for t in tokens:
                # parts of a forest of several chains would do what smaller forests do
                most = min(ranks // (pp * tp), t // (tp * _LEAST_TOKENS)) if t == job.seq_len else 1
                for cp in _choice(plan.cp, [n for n in sizes if n <= max(1, most)]):
                    for ep in _choice(plan.ep, _divisors(m.num_experts)):
                        for schedule, vpp in _schedules(plan, pp, m.num_hidden_layers):
                            yield Layout(ParallelConfig(pp=pp, cp=cp, tp=tp, ep=ep, vpp=vpp, schedule=schedule), t)


def _schedules(plan: PlanConfig, pp: int, layers: int) -> Iterator[tuple[str, int]]:
    """(schedule, chunks per rank); a place alone has no schedule."""
    if pp == 1:
        yield plan.schedule or "1f1b", plan.vpp or 1
        return
    most = min(_MOST_VPP, (layers + 1) // pp)
    looped = [2**i for i in range(1, most.bit_length())]
    chunks = {"1f1b": [1], "interleaved": looped, "zero_bubble": looped, "zbv": [2]}
    for schedule in _choice(plan.schedule, list(chunks)):
        for vpp in _choice(plan.vpp, chunks.get(schedule, [1])):
            yield schedule, vpp


def _choice(given: Any, otherwise: list[Any]) -> list[Any]:
    return otherwise if given is None else [given]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
