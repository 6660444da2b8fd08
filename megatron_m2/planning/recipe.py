"""From step time to days: the stretches of a training run, its checkpoints, and what failures cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp, sqrt

from megatron_m2.model.config import ModelConfig
from megatron_m2.planning.cluster import Device
from megatron_m2.planning.config import PlannerConfig, RecipeStage
from megatron_m2.planning.search import Plan, search

DAY = 86_400.0


@dataclass(frozen=True)
class Checkpoints:
    """How often to save, and what saving and failing take.

    Attributes:
        bytes: of one checkpoint: weights, fp32 masters and moments. seconds: to write it, training stopped.
        interval: seconds of training between two. failures: mean seconds between failures of the whole cluster.
        useful: share of the time that goes into steps which are kept.
    """

    bytes: int
    seconds: float
    interval: float
    failures: float
    useful: float


def checkpoints(model: ModelConfig, ranks: int, device: Device) -> Checkpoints:
    """By Daly (Future Generation Computer Systems 22, 2006): the interval of eq. 37, which refines Young's sqrt(2 write failures), and
    the wall-clock time of eq. 20."""
    router = (model.num_hidden_layers + model.num_mtp_modules) * model.num_experts
    wide = router * model.hidden_size
    size = 14 * (model.num_parameters() - wide - router) + 16 * wide + 4 * router
    write, between = size / (device.storage_write.value * ranks), device.mtbf.value / ranks
    if write < 2 * between:
        interval = sqrt(2 * write * between) * (1 + sqrt(write / (2 * between)) / 3 + write / (2 * between) / 9) - write
    else:
        interval = between
    lost = (interval + write) / between
    useful = 0.0 if lost > 700 else interval / (between * exp(device.restart.value / between) * (exp(lost) - 1))
    return Checkpoints(size, write, interval, between, useful)


@dataclass(frozen=True)
class Stretch:
    """One stage of the recipe on its fastest layout.

    Attributes:
        plan: None where nothing fits, or the model does not take so long a chain; why says which.
        days: of steps alone. elapsed: with checkpoints and failures.
    """

    name: str
    stage: RecipeStage
    plan: Plan | None
    checkpoints: Checkpoints
    why: str = ""

    @property
    def days(self) -> float:
        return self.stage.tokens / self.plan.time.tokens_per_s / DAY if self.plan else float("inf")

    @property
    def elapsed(self) -> float:
        return self.days / self.checkpoints.useful if self.checkpoints.useful else float("inf")


def stretches(config: PlannerConfig) -> list[Stretch]:
    """Every stage of the recipe, each with its own search; what the configuration fixes stays fixed, but for the tokens of a forest."""
    found: list[Stretch] = []
    best: dict[tuple[int, int], tuple[Plan | None, str]] = {}
    for name, stage in config.recipe.items():
        key = stage.seq_len, stage.num_mtp_modules
        model = replace(config.model, num_mtp_modules=stage.num_mtp_modules)
        if key not in best:
            best[key] = _best(replace(config, model=model, plan=replace(config.plan, seq_len=stage.seq_len, tokens_per_forest=None)))
        plan, why = best[key]
        found.append(Stretch(name, stage, plan, checkpoints(model, config.cluster.ranks, config.device), why))
    return found


def _best(config: PlannerConfig) -> tuple[Plan | None, str]:
    try:
        plans = search(config.job(), config.device, config.plan).plans
    except ValueError as error:
        return None, str(error)
    return (plans[0], "") if plans else (None, "no layout fits the memory")
