"""Megatron's indexed dataset: ``NAME.bin`` holds token ids back to back, ``NAME.idx`` where each sequence lies.

Layout of ``.idx`` (little endian; megatron/core/datasets/indexed_dataset.py): magic ``MMIDIDX\\0\\0``, u64 version 1, u8 dtype code,
u64 sequences, u64 document boundaries (documents + 1), int32 length of each sequence, int64 byte offset of each, int64 first sequence
of each document and the end. Here a document is written as one sequence; one of several sequences is read as their concatenation.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# Megatron's codes 6 and 7 are floats, which are no tokens.
_DTYPES: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def token_dtype(vocab_size: int) -> type[np.generic]:
    """uint16 below 65,500 ids, else int32: what Megatron chooses."""
    return np.uint16 if vocab_size < 65_500 else np.int32


def write_indexed(prefix: str | Path, documents: Iterable[np.ndarray | list[int]], vocab_size: int) -> int:
    """Writes ``prefix.bin`` and ``prefix.idx``, streaming; both appear complete or not at all, the index last.

    Returns:
        The number of tokens.

    Raises:
        ValueError: an id outside the vocabulary; the message names the document.
    """
    prefix, dtype = Path(prefix), token_dtype(vocab_size)
    lengths: list[int] = []
    targets = _paths(prefix)
    writing_binary, writing_index = writing = [p.with_name(p.name + ".writing") for p in targets]
    try:
        with open(writing_binary, "wb") as f:
            for number, document in enumerate(documents):
                ids = np.asarray(document, dtype=np.int64)
                if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
                    raise ValueError(f"{prefix}: document {number} has an id outside the vocabulary of {vocab_size}")
                f.write(ids.astype(dtype).tobytes())
                lengths.append(len(ids))
            _sync(f)
        with open(writing_index, "wb") as f:
            _write_index(f, np.asarray(lengths, dtype=np.int32), dtype)
            _sync(f)
        binary, index = targets
        index.unlink(missing_ok=True)  # an older index must never stand beside the new tokens
        os.replace(writing_binary, binary)
        os.replace(writing_index, index)
    finally:
        for path in writing:
            path.unlink(missing_ok=True)
    return sum(lengths)


def _write_index(f: BinaryIO, lengths: np.ndarray, dtype: type[np.generic]) -> None:
    code = next(c for c, d in _DTYPES.items() if d is dtype)
    f.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
    f.write(lengths.tobytes())
    f.write((_starts(lengths)[:-1] * np.dtype(dtype).itemsize).tobytes())
    f.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


class IndexedDataset:
    """Memory-mapped documents of ``prefix.bin`` / ``prefix.idx``.

    Attributes:
        lengths: int64 [documents], tokens of each.
        dtype: of the stored ids.

    Raises:
        ValueError: a file is missing, of another kind or version, truncated, or the two do not belong together; it names the file.
    """

    def __init__(self, prefix: str | Path) -> None:
        binary, index = _paths(Path(prefix))
        for path in (binary, index):
            if not path.is_file():
                raise ValueError(f"{path}: no such file")
        self.dtype, self._first = _read_index(index)
        self.lengths = np.diff(self._first)
        size, needed = binary.stat().st_size, int(self._first[-1]) * self.dtype.itemsize
        if size != needed:
            raise ValueError(f"{binary}: {size} bytes, but its index says {needed}: truncated or of another index")
        self._tokens = np.memmap(binary, self.dtype, "r") if needed else np.zeros(0, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Token ids [length] of a document from ``start`` (None: to its end), in the stored dtype."""
        stop = int(self.lengths[document]) if length is None else start + length
        assert 0 <= start <= stop <= self.lengths[document]
        first = int(self._first[document])
        return self._tokens[first + start : first + stop]


def _read_index(index: Path) -> tuple[np.dtype, np.ndarray]:
    """The dtype of the ids and int64 [documents + 1], where each document starts in tokens, and the end."""
    raw = index.read_bytes()
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        raise ValueError(f"{index}: not an indexed dataset (bad magic)")
    _, version, code, sequences, boundaries = _HEADER.unpack_from(raw)
    if version != 1 or code not in _DTYPES:
        raise ValueError(f"{index}: version {version} with dtype code {code}; this reads version 1, codes {sorted(_DTYPES)}")
    needed = _HEADER.size + 12 * sequences + 8 * boundaries
    if sequences and len(raw) == needed + sequences:
        raise ValueError(f"{index}: multimodal (a mode per sequence); this reads text only")
    if len(raw) != needed:
        raise ValueError(f"{index}: {len(raw)} bytes, but {sequences} sequences need {needed}: truncated or damaged")
    dtype = np.dtype(_DTYPES[code])
    lengths = np.frombuffer(raw, np.int32, sequences, _HEADER.size)
    offsets = np.frombuffer(raw, np.int64, sequences, _HEADER.size + 4 * sequences)
    documents = np.frombuffer(raw, np.int64, boundaries, _HEADER.size + 12 * sequences)
    starts = _starts(lengths)
    if (lengths < 0).any() or not np.array_equal(offsets, starts[:-1] * dtype.itemsize):
        raise ValueError(f"{index}: sequences do not lie back to back: damaged")
    if boundaries == 0 or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise ValueError(f"{index}: document boundaries do not cover its {sequences} sequences in order: damaged")
    return dtype, starts[documents]


def _starts(lengths: np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each of n stretches laid back to back starts, and the end."""
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _paths(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def _sync(f: BinaryIO) -> None:
    f.flush()
    os.fsync(f.fileno())
