"""The typed configuration of a training run; one dataclass per group of ``hydra_configs/``. Unknown keys are refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

import torch

from megatron_m2.model.config import ModelConfig
from megatron_m2.parallel.layout import Limits, ParallelConfig, check
from megatron_m2.parallel.sharding import Sharding

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
        path: folder that ``tools/prepare_data.py`` wrote.
        blend: dataset name to its share of the training tokens; shares above a dataset's size up-sample it.
        seq_len: longest chain, in tokens; longer documents are cut.
        tokens_per_forest: tokens of one microbatch.
        open_documents: read side by side, a chain of each in turn, so that a batch mixes many even where each is long.
    """

    path: str
    blend: dict[str, float]
    seq_len: int = 1024
    tokens_per_forest: int = 8192
    open_documents: int = 64


@dataclass(frozen=True)
class OptimConfig:
    """AdamW on fp32 master weights. ``min_lr_ratio``: last learning rate over the peak. Norms are not decayed."""

    lr: float = 3e-4
    min_lr_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0


@dataclass(frozen=True)
class StageConfig:
    """One stage of training, in optimizer steps: warm-up, constant learning rate, decay (WSD).

    Attributes:
        steps, warmup_steps, decay_steps: in all, at the start, at the end.
        forests_per_step: microbatches accumulated into one optimizer step.
        mtp_weight, mtp_weight_end: weight of the MTP loss during the constant phase, and what the decay phase anneals it to.
        router_bias_rate: step of the aux-loss-free balance update (0 switches it off); it follows the learning rate's shape in the decay.
    """

    steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    forests_per_step: int = 1
    mtp_weight: float = 0.3
    mtp_weight_end: float = 0.1
    router_bias_rate: float = 1e-3


@dataclass(frozen=True)
class RunConfig:
    """Where and how to run.

    Attributes:
        dir: folder of the run: checkpoints, metrics.jsonl, plot, export.
        seed: of the initial weights and the data order.
        device: "auto" takes the GPU when there is one.
        dtype: of compute and of the working weights.
        eval_every, save_every, log_every: in steps; 0 for at the end only.
        eval_tokens: held-out tokens per dataset of an intermediate evaluation; the last one takes all.
        keep_checkpoints: how many of the newest to keep.
        sample_tokens: tokens of the sample printed at the end (0: none).
        export: write the Hugging Face folder at the end.
        wandb: "offline", "online" or "disabled".
        wandb_project, wandb_id: the run id is made once per folder unless given, so that a resumed run goes on in wandb.
    """

    dir: str
    seed: int = 0
    device: str = "auto"
    dtype: str = "bfloat16"
    eval_every: int = 0
    eval_tokens: int = 65_536
    save_every: int = 0
    log_every: int = 10
    keep_checkpoints: int = 2
    sample_tokens: int = 0
    sample_prompt: str = "def "
    export: bool = True
    wandb: str = "offline"
    wandb_project: str = "megatron_m2"
    wandb_id: str | None = None


@dataclass(frozen=True)
class TrainConfig:
    """All of it. See :func:`from_dict` for how it comes out of Hydra.

    Raises:
        ValueError: on construction, naming the field, its value and what is legal.
    """

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    stage: StageConfig = field(default_factory=lambda: StageConfig(steps=1))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sharding: Sharding = field(default_factory=Sharding)
    run: RunConfig = field(default_factory=lambda: RunConfig(dir="runs/unnamed"))

    def __post_init__(self) -> None:
        s, d, o, r = self.stage, self.data, self.optim, self.run
        _require(s.steps >= 1, "stage.steps", s.steps, "at least 1")
        _require(s.warmup_steps >= 0, "stage.warmup_steps", s.warmup_steps, "at least 0")
        _require(0 <= s.decay_steps <= s.steps - s.warmup_steps, "stage.decay_steps", s.decay_steps,
                 f"between 0 and steps - warmup_steps = {s.steps - s.warmup_steps}")
        _require(s.forests_per_step >= 1, "stage.forests_per_step", s.forests_per_step, "at least 1")
        _require(2 <= d.seq_len <= self.model.max_position_embeddings, "data.seq_len", d.seq_len,
                 f"between 2 and model.max_position_embeddings = {self.model.max_position_embeddings}")
        _require(d.tokens_per_forest >= 2, "data.tokens_per_forest", d.tokens_per_forest, "at least 2")
        _require(d.open_documents >= 1, "data.open_documents", d.open_documents, "at least 1")
        _require(len(d.blend) > 0, "data.blend", dict(d.blend), "at least one dataset")
        _require(o.lr > 0, "optim.lr", o.lr, "positive")
        _require(o.grad_clip > 0, "optim.grad_clip", o.grad_clip, "positive")
        _require(r.dtype in DTYPES, "run.dtype", r.dtype, f"one of {', '.join(DTYPES)}")
        _require(r.dtype == "bfloat16" or not self.model.fp8_experts, "model.fp8_experts", True, f"false with run.dtype = {r.dtype}")
        _require(r.dtype != "float64" or not self.parallel.ep_fp8_payload, "parallel.ep_fp8_payload", True,
                 f"false with run.dtype = {r.dtype}")
        _require(r.wandb in ("offline", "online", "disabled"), "run.wandb", r.wandb, "offline, online or disabled")
        _require(r.keep_checkpoints >= 1, "run.keep_checkpoints", r.keep_checkpoints, "at least 1")
        for name in ("eval_every", "save_every", "sample_tokens"):
            _require(getattr(r, name) >= 0, f"run.{name}", getattr(r, name), "at least 0")
        _require(r.log_every >= 1, "run.log_every", r.log_every, "at least 1")

    def check_layout(self, world: int) -> None:
        """Refuses a layout that ``world`` ranks, this model and these batches do not allow.

        Raises:
            ValueError: naming the field, its value and the nearest legal one.
        """
        m = self.model
        check(self.parallel, world, Limits(m.num_attention_heads, m.num_key_value_heads, m.num_experts, m.num_hidden_layers,
                                           self.stage.forests_per_step, self.data.tokens_per_forest))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


GROUPS: dict[str, Any] = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "stage": StageConfig, "parallel": ParallelConfig,
                          "sharding": Sharding, "run": RunConfig}


def _require(legal: bool, name: str, value: object, what: str) -> None:
    if not legal:
        raise ValueError(f"{name} = {value}: must be {what}")


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Builds the typed configuration from plain nested dictionaries (a resolved Hydra config).

    Raises:
        ValueError: an unknown or missing key, or a value of the wrong type, naming it.
    """
    for name in values:
        if name not in GROUPS:
            raise ValueError(f"{name}: unknown group; known are {', '.join(GROUPS)}")
    return TrainConfig(**{name: typed(name, kind, values.get(name) or {}) for name, kind in GROUPS.items()})


def typed(group: str, kind: type, values: dict[str, Any]) -> Any:
    """One dataclass from plain values.

    Raises:
        ValueError: an unknown or missing key, or a value of the wrong type, naming it.
    """
    assert is_dataclass(kind)
    by_name = {f.name: f for f in fields(kind)}
    converted = {}
    for key, value in values.items():
        if key not in by_name:
            raise ValueError(f"{group}.{key}: unknown key; known are {', '.join(by_name)}")
        converted[key] = _convert(f"{group}.{key}", str(by_name[key].type), value)
    try:
        return kind(**converted)
    except TypeError as error:  # a required key is missing: dataclasses say which
        raise ValueError(f"{group}: {str(error).split('__init__() ')[-1]}") from None


def _convert(name: str, kind: str, value: Any) -> Any:
    """YAML reads 1e-3 as a string and 1 as an int: bring a value to its field's type, refusing what loses something."""
    if kind.endswith("| None") and value is None:
        return None
    kind = kind.removesuffix(" | None")
    try:
        if kind == "int" and not isinstance(value, bool) and float(value) == int(float(value)):
            return int(float(value))
        if kind == "float" and not isinstance(value, bool):
            return float(value)
        if kind == "dict[str, float]":
            return {str(k): float(v) for k, v in value.items()}
    except (TypeError, ValueError, AttributeError):
        pass  # falls through to the one error line below
    if (kind == "bool" and isinstance(value, bool)) or (kind == "str" and isinstance(value, str)):
        return value
    raise ValueError(f"{name} = {value!r}: must be {kind}")
