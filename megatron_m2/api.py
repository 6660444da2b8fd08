"""Reading and writing whole models, whatever the format."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_m2.model.hf import load_hf, save_hf
from megatron_m2.model.m2 import M2Model
from megatron_m2.training import checkpoint

__all__ = ["load", "save_hf"]


def load(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> M2Model:
    """A model from a Hugging Face folder (bf16, fp32 or block-FP8), a native checkpoint, or a run folder (its newest checkpoint).

    Args:
        dtype: of weights and compute; default: as stored (bf16 for FP8 weights). The router stays fp32.

    Raises:
        ValueError: nothing readable there, damaged, or of another kind of model; the message names the file or field.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return load_hf(path, dtype, device)
    return checkpoint.load_model(path, dtype, device)
