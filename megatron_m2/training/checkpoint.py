"""Checkpoints on torch.distributed.checkpoint: atomic, verified when read, resumable from a kill at any moment.

A checkpoint is a folder ``step_00000100`` with the tensors (``state/``), ``model_config.json``, ``trainer.json`` (step, data position)
and ``manifest.json``, which lists every other file with its size. It is written under another name and renamed when complete, so a
folder of this name is whole; the manifest catches what a bad copy did to it afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron_m2.model.config import ModelConfig
from megatron_m2.model.m2 import M2Model, build_model

_NAME = re.compile(r"step_(\d{8})$")
_TEMPORARY = ".writing-"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the folder and why."""


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints under ``folder``, oldest first."""
    return sorted(p for p in Path(folder).glob("step_*") if _NAME.search(p.name) and (p / "manifest.json").is_file())


def save(folder: str | Path, step: int, config: ModelConfig, state: dict[str, Any], trainer: dict[str, Any], keep: int = 0) -> Path:
    """Writes ``folder/step_XXXXXXXX`` atomically.

    Args:
        state: nested dictionaries of tensors.
        trainer: plain values for JSON.
        keep: afterwards remove all but so many of the newest (0: keep all).

    Raises:
        CheckpointError: it could not be written, for example for want of space. Earlier checkpoints are untouched.
    """
    folder = Path(folder)
    final, writing = folder / f"step_{step:08d}", folder / f"{_TEMPORARY}{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        writing.mkdir()
        with _one_process():
            dcp.save(state, storage_writer=dcp.FileSystemWriter(writing / "state", sync_files=True), no_dist=True)
        _write_json(writing / "model_config.json", config.to_dict())
        _write_json(writing / "trainer.json", {"step": step, **trainer})
        sizes = {str(p.relative_to(writing)): p.stat().st_size for p in sorted(writing.rglob("*")) if p.is_file()}
        _write_json(writing / "manifest.json", sizes)
        _sync(writing)
        if final.exists():
            shutil.rmtree(final)
        writing.rename(final)
        _sync(folder)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise CheckpointError(f"cannot save {final}: {_reason(error)}") from error
    if keep:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def load(path: str | Path, state: dict[str, Any]) -> dict[str, Any]:
    """Reads a checkpoint folder into the tensors of ``state``, in place.

    Returns:
        The ``trainer`` values that were saved.

    Raises:
        CheckpointError: damaged, or of another model.
    """
    path = Path(path)
    verify(path)
    try:
        with _one_process():
            dcp.load(state, storage_reader=dcp.FileSystemReader(path / "state"), no_dist=True)
    except (OSError, CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot load {path}: {_reason(error)}") from error
    trainer: dict[str, Any] = json.loads((path / "trainer.json").read_text())
    return trainer


def verify(path: str | Path) -> None:
    """Checks every file against the manifest.

    Raises:
        CheckpointError: naming the first file that is missing or has another size.
    """
    path = Path(path)
    try:
        sizes = json.loads((path / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no complete checkpoint: {_reason(error)}") from error
    for name, size in sizes.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        if actual != size:
            raise CheckpointError(f"{path} is damaged: {name} " + ("is missing" if actual is None else f"has {actual} bytes, not {size}"))


def resolve(path: str | Path) -> Path:
    """A checkpoint folder from itself, from a run folder, or from the run's ``checkpoints`` folder (then the newest).

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / "manifest.json").is_file():
        return path
    found = checkpoints(path) or checkpoints(path / "checkpoints")
    if not found:
        raise CheckpointError(f"{path}: no checkpoint here")
    return found[-1]


def read_config(path: str | Path) -> ModelConfig:
    """Shape of the model in a checkpoint folder.

    Raises:
        CheckpointError: unreadable.
    """
    try:
        return ModelConfig.from_dict(json.loads((Path(path) / "model_config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: model_config.json: {_reason(error)}") from error


def load_model(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> M2Model:
    """The model of a native checkpoint (or of the newest in a run folder), in the dtype it was saved in unless one is given."""
    path = resolve(path)
    verify(path)
    config = read_config(path)
    metadata = dcp.FileSystemReader(path / "state").read_metadata().state_dict_metadata
    saved_dtype = metadata["model.lm_head.weight"].properties.dtype  # type: ignore[union-attr]
    model = build_model(config, saved_dtype, device)
    load(path, {"model": model.state_dict()})
    if dtype is None or dtype == saved_dtype:
        return model
    converted = build_model(config, dtype, device)
    with torch.no_grad():
        for name, value in converted.state_dict().items():
            value.copy_(model.state_dict()[name])
    return converted


def save_model(model: M2Model, path: str | Path) -> Path:
    """Writes a model alone as checkpoint ``path/step_00000000``."""
    return save(path, 0, model.config, {"model": model.state_dict()}, {})


def remove_unfinished(folder: str | Path) -> None:
    """Removes what a kill left half-written."""
    for p in Path(folder).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(p)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """dcp warns on every call that there is no process group, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _reason(error: BaseException) -> str:
    """The first line of the innermost error: dcp wraps what happened on each rank."""
    if isinstance(error, CheckpointException):
        with contextlib.suppress(StopIteration):
            wrapped = next(iter(error.failures.values()))
            return _reason(wrapped[0])
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
