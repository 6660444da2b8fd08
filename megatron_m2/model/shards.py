"""Folders of safetensors: reading tensor by tensor, writing shard by shard, and a folder that appears only when complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}


class ShardReader:
    """The tensors of a Hugging Face folder, one at a time; at most two shards are mapped into memory together.

    Attributes:
        folder: where they lie.
        file_of: name of the shard that holds each tensor, in the order in which reading them touches each shard once.
        shape_of, dtype_of: what the shards' headers say.

    Raises:
        ValueError: on construction, naming the file: none there, missing, truncated, not what the index says, or not floating point.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.file_of: dict[str, str] = {}
        self.shape_of: dict[str, tuple[int, ...]] = {}
        self.dtype_of: dict[str, torch.dtype] = {}
        self._open: dict[str, Any] = {}
        index = self._read_index()
        for file in sorted(set(index.values())) if index is not None else [SINGLE]:
            self._read_header(file)
        for key, file in (index or {}).items():
            if self.file_of.get(key) != file:
                raise ValueError(f"{self.folder / INDEX}: puts {key} in {file}, which does not hold it")

    def _read_index(self) -> dict[str, str] | None:
        path = self.folder / INDEX
        if not path.is_file():
            if not (self.folder / SINGLE).is_file():
                raise ValueError(f"{self.folder}: neither {INDEX} nor {SINGLE} here")
            return None
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
            raise ValueError(f"{path}: weight_map is missing or not a map from tensor to file")
        return index

    def _read_header(self, file: str) -> None:
        path = self.folder / file
        if not path.is_file():
            raise ValueError(f"{path}: missing, though {INDEX} lists it")
        try:
            with safe_open(path, "pt") as shard:
                for key in shard.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    header = shard.get_slice(key)
                    if header.get_dtype() not in _DTYPES:
                        raise ValueError(f"{path}: {key} is {header.get_dtype()}; readable are {', '.join(_DTYPES)}")
                    if key in self.file_of:
                        raise ValueError(f"{path}: holds {key}, and so does {self.file_of[key]}")
                    self.file_of[key], self.shape_of[key] = file, tuple(header.get_shape())
                    self.dtype_of[key] = _DTYPES[header.get_dtype()]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged or truncated ({error})") from error

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU, as stored."""
        file = self.file_of[key]
        if file not in self._open:
            while len(self._open) >= 2:  # a weight and its FP8 scale may lie in two shards
                del self._open[next(iter(self._open))]
            self._open[file] = safe_open(self.folder / file, "pt")
        tensor: Tensor = self._open[file].get_tensor(key)
        return tensor


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: naming the file: unreadable, or anything but an object.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, not an object")
    return value


def write_shards(folder: Path, sizes: Mapping[str, int], fetch: Callable[[str], dict[str, Tensor]], max_shard_bytes: int) -> None:
    """Writes ``model.safetensors``, or numbered shards and their index, holding one shard in memory at a time.

    Args:
        sizes: bytes of what ``fetch`` gives for each key, in the order to write.
        fetch: the tensors to store for a key (a weight, or an FP8 weight and its scale), contiguous, on the CPU.
        max_shard_bytes: a shard exceeds this only when it holds a single key.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: tensor for key in keys for name, tensor in fetch(key).items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes files that only their owner can read; a server may be someone else
        weight_map |= dict.fromkeys(tensors, file)
        del tensors  # before the next shard is gathered
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Two-space JSON with a last newline."""
    path.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def complete_folder(path: str | Path) -> Iterator[Path]:
    """Gives a temporary folder beside ``path`` that becomes ``path`` when the block ends well and vanishes when it does not.

    An earlier checkpoint at ``path`` is replaced at the end, and stays if writing fails.

    Raises:
        ValueError: ``path`` holds something that is no checkpoint, or it could not be written (a full disk, say).
    """
    path = Path(path).absolute()
    if path.exists() and not (path / "config.json").is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: exists and is no Hugging Face checkpoint; it is left as it is")
    writing, replaced = (path.with_name(f".{path.name}.{what}") for what in ("writing", "replaced"))
    try:
        _undo(path, writing, replaced)  # what a kill left
        writing.mkdir(parents=True)
        yield writing
        for file in [*writing.iterdir(), writing]:
            _sync(file)
        if path.exists():
            path.rename(replaced)
        writing.rename(path)
        _sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        _undo(path, writing, replaced)
        raise ValueError(f"cannot write {path}: {error}; nothing of it was kept") from error
    except BaseException:
        _undo(path, writing, replaced)
        raise


def _undo(path: Path, writing: Path, replaced: Path) -> None:
    """Removes an unfinished folder and puts back the earlier one if it was already moved aside."""
    shutil.rmtree(writing, ignore_errors=True)
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's names, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
