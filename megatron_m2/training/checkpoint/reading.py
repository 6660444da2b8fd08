"""Reading checkpoints: into a run's state at any layout, as a model, or straight into a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_m2.model.hf import write_hf
from megatron_m2.model.m2 import M2Model, build_model
from megatron_m2.parallel.mesh import ONE, Mesh
from megatron_m2.training.checkpoint.folder import checkpoints, read_config, resolve, verify
from megatron_m2.training.checkpoint.ranks import Ranks
from megatron_m2.training.checkpoint.tensors import StateReader, flatten


def newest(folder: str | Path, mesh: Mesh = ONE) -> Path | None:
    """The newest complete checkpoint that rank 0 sees, so that all ranks go on from the same; they call it together."""
    found = Ranks.of(mesh).on_first(f"cannot look into {folder}", lambda: checkpoints(folder)[-1:])
    return found[0] if found else None


def load(path: str | Path, state: dict[str, Any], mesh: Mesh = ONE) -> dict[str, Any]:
    """Reads a checkpoint folder into the tensors of ``state``, in place. All ranks of the mesh call it together.

    Args:
        state: as of :func:`~megatron_m2.training.checkpoint.save`, at this layout.

    Returns:
        The ``trainer`` values that were saved.

    Raises:
        CheckpointError: on every rank: damaged, or of another model.
    """
    path, ranks = Path(path), Ranks.of(mesh)
    ranks.on_first(f"cannot load {path}", lambda: verify(path))

    def read() -> dict[str, Any]:
        StateReader(path / "state").read_into(flatten(state), ranks)
        trainer: dict[str, Any] = json.loads((path / "trainer.json").read_text())
        return trainer

    return ranks.together(f"cannot load {path}", read)[ranks.rank]


def load_model(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> M2Model:
    """The model of a native checkpoint (or of the newest in a run folder), in the dtype it was saved in unless one is given."""
    path = resolve(path)
    verify(path)
    config = read_config(path)
    saved_dtype = StateReader(path / "state").dtype("model.lm_head.weight")
    model = build_model(config, saved_dtype, device)
    load(path, {"model": model.state_dict()})
    if dtype is None or dtype == saved_dtype:
        return model
    converted = build_model(config, dtype, device)
    with torch.no_grad():
        for name, value in converted.state_dict().items():
            value.copy_(model.state_dict()[name])
    return converted


def export_hf(source: str | Path, path: str | Path, tokenizer_dir: str | Path | None = None, *, dtype: torch.dtype | None = None,
              fp8: bool = False, max_shard_bytes: int = 4 << 30) -> None:
    """Writes the model of a native checkpoint (or of the newest in a run folder) as a Hugging Face folder without building it.

    Whatever layout wrote the checkpoint: tensors are read one by one; memory for two shards is enough.

    Args:
        dtype: of the weights on disk; default: as saved. Others as of :func:`megatron_m2.model.hf.save_hf`.

    Raises:
        ValueError: the checkpoint cannot be read, or as ``save_hf``.
    """
    source = resolve(source)
    verify(source)
    reader = StateReader(source / "state", cache_bytes=max_shard_bytes)
    write_hf(path, read_config(source), lambda slot: reader.part(f"model.{slot.name}", slot.index),
             dtype or reader.dtype("model.lm_head.weight"), tokenizer_dir, fp8=fp8, max_shard_bytes=max_shard_bytes)
