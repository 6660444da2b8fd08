"""From ``hydra_configs/`` and a user's overrides to the typed configuration."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_m2.training.config import GROUPS, TrainConfig, from_dict

CONFIGS = Path(__file__).resolve().parents[2] / "hydra_configs"

# What train.yaml starts from: every field's own default, so that a field which no file mentions can be overridden without a "+".
ConfigStore.instance().store("field_defaults", {
    group: {f.name: f.default for f in fields(kind) if f.default is not MISSING} for group, kind in GROUPS.items()})


def read_config(overrides: list[str]) -> TrainConfig:
    """Composes ``hydra_configs/train.yaml`` with Hydra overrides.

    Raises:
        ValueError: one line that names what is wrong.
    """
    return from_dict(compose_values("train", overrides))


def compose_values(root: str, overrides: list[str]) -> dict[str, Any]:
    """Composes ``hydra_configs/{root}.yaml`` with Hydra overrides: plain values by group.

    Raises:
        ValueError: one line that names what is wrong.
    """
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = OmegaConf.to_container(compose(root, overrides), resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
        raise ValueError(": ".join(str(e).strip().splitlines()[0] for e in (error, cause) if e is not None)) from None
    assert isinstance(composed, dict)
    return {str(k): v for k, v in composed.items()}
