"""The folders of checkpoints: which are complete, how one comes to be, what damage looks like."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_m2.model.config import ModelConfig

_NAME = re.compile(r"step_(\d{8})(\.old)?$")
_TEMPORARY = ".writing-"
_REMOVING = ".removing-"
_OLD = ".old"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names the folder and why."""


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints under ``folder``, oldest first.

    ``step_XXXXXXXX.old`` counts where a kill came while it was being replaced, between its renaming and that of its successor.
    """
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).glob("step_*"), reverse=True):  # the .old one first
        match = _NAME.match(path.name)
        if match and (path / "manifest.json").is_file():
            found[match[1]] = path
    return [found[step] for step in sorted(found)]


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


def verify(path: str | Path) -> None:
    """Checks every file against the manifest.

    Raises:
        CheckpointError: naming the first file that is missing or has another size.
    """
    path = Path(path)
    try:
        sizes = json.loads((path / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no complete checkpoint: {reason(error)}") from error
    for name, size in sizes.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        if actual != size:
            raise CheckpointError(f"{path} is damaged: {name} " + ("is missing" if actual is None else f"has {actual} bytes, not {size}"))


def read_config(path: str | Path) -> ModelConfig:
    """Shape of the model in a checkpoint folder.

    Raises:
        CheckpointError: unreadable.
    """
    try:
        return ModelConfig.from_dict(json.loads((Path(path) / "model_config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: model_config.json: {reason(error)}") from error


# ---- one being written --------------------------------------------------------------------------------------------------------------


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def begin(folder: Path, step: int) -> Path:
    """An empty folder to write a checkpoint's files in."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    writing = folder / f"{_TEMPORARY}{step:08d}"
    writing.mkdir()
    return writing


def complete(writing: Path, final: Path, written: Mapping[str, int], documents: Mapping[str, Any], keep: int) -> None:
    """Adds documents and manifest, makes everything durable, and gives the checkpoint its name.

    Args:
        written: the tensors' files, relative to ``writing``, with the sizes that their writers saw.
        documents: JSON by file name.
        keep: afterwards remove all but so many of the newest (0: keep all).
    """
    for name, size in written.items():
        if not (writing / name).is_file() or (writing / name).stat().st_size != size:
            raise OSError(f"rank 0 does not see {name} ({size} bytes), which a rank wrote: the folder must be one that all ranks share")
    for name, value in documents.items():
        _write_json(writing / name, value)
    sizes = {str(p.relative_to(writing)): p.stat().st_size for p in sorted(writing.rglob("*")) if p.is_file()}
    _write_json(writing / "manifest.json", sizes)
    for path in (writing / "state", writing):
        _sync(path)
    old = final.with_name(final.name + _OLD)
    if final.exists():
        final.rename(old)
    writing.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    if keep:
        for path in checkpoints(final.parent)[:-keep]:
            removing = path.with_name(_REMOVING + path.name)  # a kill must not leave half of one under its name
            path.rename(removing)
            shutil.rmtree(removing)


def abandon(folder: Path, step: int) -> None:
    """Removes what a failed attempt left; an earlier checkpoint of the same step gets its name back."""
    shutil.rmtree(folder / f"{_TEMPORARY}{step:08d}", ignore_errors=True)
    final = folder / name_of(step)
    if not final.exists() and final.with_name(final.name + _OLD).exists():
        final.with_name(final.name + _OLD).rename(final)


def remove_unfinished(folder: str | Path) -> None:
    """Removes what a kill left half-written, half-replaced or half-removed."""
    folder = Path(folder)
    for path in [*folder.glob(f"{_TEMPORARY}*"), *folder.glob(f"{_REMOVING}*")]:
        shutil.rmtree(path)
    for path in folder.glob(f"step_*{_OLD}"):
        if path.with_suffix("").exists():
            shutil.rmtree(path)
        else:
            path.rename(path.with_suffix(""))


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


def reason(error: BaseException) -> str:
    """One line: the error's kind and the first line of its message."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
