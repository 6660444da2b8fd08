"""The typed configuration of the planner: ``hydra_configs/plan.yaml`` and its groups. Unknown keys are refused."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from hydra.core.config_store import ConfigStore

from megatron_m2.model.config import ModelConfig
from megatron_m2.parallel.pipeline import SCHEDULES
from megatron_m2.planning.cluster import ClusterConfig, Device
from megatron_m2.planning.job import Job, Options
from megatron_m2.training.compose import compose_values
from megatron_m2.training.config import typed


@dataclass(frozen=True)
class PlanConfig:
    """What to plan, and what is fixed of it; None: every value is tried.

    Attributes:
        seq_len: tokens of one chain. batch_tokens: of one optimizer step (M2's is not published; 32M is in the range of MiniMax-01's
            16M to 128M).
        tokens_per_forest: of one microbatch, a multiple of seq_len; None: one to eight chains, powers of two.
        pp, vpp, cp, tp, ep, schedule: as in :class:`~megatron_m2.parallel.layout.ParallelConfig`.
        recompute, zero: the same, and of :class:`~megatron_m2.parallel.sharding.Sharding`; None: the fastest that fits, zero 1 or 2.
        top: layouts to print.
        dispatch_fp8, node_dedup, lean_experts, imbalance, hide_ep, hide_tp, hide_cp, hide_dp, hide_pp: see
            :class:`~megatron_m2.planning.job.Options`.
    """

    seq_len: int = 8192
    batch_tokens: int = 33_554_432
    tokens_per_forest: int | None = None
    pp: int | None = None
    vpp: int | None = None
    cp: int | None = None
    tp: int | None = None
    ep: int | None = None
    schedule: str | None = None
    recompute: bool | None = None
    zero: int | None = None
    top: int = 10
    dispatch_fp8: bool = False
    node_dedup: bool = False
    lean_experts: bool = False
    imbalance: float = 1.1
    hide_ep: float = 0.0
    hide_tp: float = 0.0
    hide_cp: float = 0.0
    hide_dp: float = 0.0
    hide_pp: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "tokens_per_forest", "pp", "vpp", "cp", "tp", "ep", "top"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"plan.{name} = {value}: must be at least 1")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise ValueError(f"plan.schedule = {self.schedule!r}: must be one of {', '.join(SCHEDULES)}")
        if self.zero is not None and self.zero not in (0, 1, 2):
            raise ValueError(f"plan.zero = {self.zero}: must be 0, 1 or 2")

    def options(self) -> Options:
        return Options(**{f.name: getattr(self, f.name) for f in fields(Options)})


@dataclass(frozen=True)
class RecipeStage:
    """A stretch of training.

    Attributes:
        tokens: how many. seq_len: of a chain. num_mtp_modules: multi-token-prediction modules that are trained.
    """

    tokens: float
    seq_len: int
    num_mtp_modules: int = 0

    def __post_init__(self) -> None:
        if self.tokens <= 0:
            raise ValueError(f"recipe: tokens = {self.tokens}: must be positive")


@dataclass(frozen=True)
class PlannerConfig:
    """All of it."""

    model: ModelConfig
    cluster: ClusterConfig
    device: Device
    plan: PlanConfig = field(default_factory=PlanConfig)
    recipe: dict[str, RecipeStage] = field(default_factory=dict)

    def job(self) -> Job:
        """Raises ValueError where the model does not take the sequence length, or the batch has no whole chain."""
        return Job(self.model, self.cluster, self.plan.seq_len, self.plan.batch_tokens, self.plan.options())


_GROUPS: dict[str, Any] = {"model": ModelConfig, "cluster": ClusterConfig, "plan": PlanConfig}

# What plan.yaml starts from: every field's own default, so that a field which no file mentions can be overridden without a "+".
ConfigStore.instance().store("plan_defaults", {
    group: {f.name: f.default for f in fields(kind) if f.default is not MISSING} for group, kind in _GROUPS.items()})


def read_plan(overrides: list[str]) -> PlannerConfig:
    """Composes ``hydra_configs/plan.yaml`` with Hydra overrides.

    Raises:
        ValueError: one line that names what is wrong.
    """
    values = compose_values("plan", overrides)
    for name in values:
        if name not in (*_GROUPS, "rates", "recipe"):
            raise ValueError(f"{name}: unknown group; known are {', '.join((*_GROUPS, 'rates', 'recipe'))}")
    groups = {name: typed(name, kind, values[name] or {}) for name, kind in _GROUPS.items()}
    rates, name = values["rates"] or {}, groups["cluster"].device
    if name not in rates:
        raise ValueError(f"cluster.device = {name!r}: not among the rates, {', '.join(rates)}")
    recipe = {}
    for stage, given in (values["recipe"] or {}).items():
        if not isinstance(given, dict):
            raise ValueError(f"recipe.{stage} = {given!r}: must be tokens, seq_len and num_mtp_modules")
        recipe[str(stage)] = typed(f"recipe.{stage}", RecipeStage, given)
    return PlannerConfig(device=Device.from_dict(name, rates[name]), recipe=recipe, **groups)


def read_devices(overrides: list[str]) -> dict[str, Device]:
    """All devices of ``hydra_configs/rates``, after the overrides.

    Raises:
        ValueError: one line that names what is wrong.
    """
    return {name: Device.from_dict(name, values) for name, values in (compose_values("plan", overrides)["rates"] or {}).items()}
