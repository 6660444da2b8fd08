"""Megatron's indexed dataset: ``NAME.bin`` holds token ids back to back, ``NAME.idx`` where each sequence lies.

Layout of ``.idx`` (little endian; megatron/core/datasets/indexed_dataset.py): magic ``MMIDIDX\\0\\0``, u64 version 1, u8 dtype code,
u64 sequences, u64 document boundaries (documents + 1), int32 length of each sequence, int64 byte offset of each, int64 first sequence of each document and the end.
Here a sequence is a document.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32,
                                        8: np.uint16}


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
    binary, index = _paths(prefix)
    writing = binary.with_name(binary.name + ".writing")
    lengths: list[int] = []
    with open(writing, "wb") as f:
        for number, document in enumerate(documents):
            ids = np.asarray(document, dtype=np.int64)
            if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
                raise ValueError(f"{prefix}: document {number} has an id outside the vocabulary of {vocab_size}")
            f.write(ids.astype(dtype).tobytes())
            lengths.append(len(ids))
        f.flush()
        os.fsync(f.fileno())
    sizes = np.asarray(lengths, dtype=np.int32)
    offsets = np.zeros(len(sizes), dtype=np.int64)
    np.cumsum(sizes[:-1].astype(np.int64) * np.dtype(dtype).itemsize, out=offsets[1:])
    code = next(c for c, d in _DTYPES.items() if d is dtype)
    writing_index = index.with_name(index.name + ".writing")
    with open(writing_index, "wb") as f:
        f.write(_HEADER.pack(_MAGIC, 1, code, len(sizes), len(sizes) + 1))
        f.write(sizes.tobytes() + offsets.tobytes() + np.arange(len(sizes) + 1, dtype=np.int64).tobytes())
        f.flush()
        os.fsync(f.fileno())
    os.replace(writing, binary)
    os.replace(writing_index, index)
    return int(sizes.sum(dtype=np.int64))


class IndexedDataset:
    """Memory-mapped documents of ``prefix.bin`` / ``prefix.idx``.

    Attributes:
        lengths: int32 [documents], tokens of each.

    Raises:
        ValueError: not such a file, of another version, truncated, or with several sequences in a document; it names the file.
    """

    def __init__(self, prefix: str | Path) -> None:
        binary, index = _paths(Path(prefix))
        for path in (binary, index):
            if not path.is_file():
                raise ValueError(f"{path}: no such file")
        raw = index.read_bytes()
        if len(raw) < _HEADER.size or raw[: len(_MAGIC)] != _MAGIC:
            raise ValueError(f"{index}: not an indexed dataset (bad magic)")
        _, version, code, sequences, boundaries = _HEADER.unpack_from(raw)
        if version != 1 or code not in _DTYPES:
            raise ValueError(f"{index}: version {version} with dtype code {code}; this reads version 1, codes {sorted(_DTYPES)}")
        if len(raw) < _HEADER.size + 12 * sequences + 8 * boundaries:
            raise ValueError(f"{index}: truncated: {len(raw)} bytes for {sequences} sequences")
        self.dtype = np.dtype(_DTYPES[code])
        self.lengths = np.frombuffer(raw, np.int32, sequences, _HEADER.size)
        self._offsets = np.frombuffer(raw, np.int64, sequences, _HEADER.size + 4 * sequences)
        documents = np.frombuffer(raw, np.int64, boundaries, _HEADER.size + 12 * sequences)
        if not np.array_equal(documents, np.arange(sequences + 1)):
            raise ValueError(f"{index}: documents of several sequences; write one sequence per document")
        needed = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if binary.stat().st_size != needed:
            raise ValueError(f"{binary}: {binary.stat().st_size} bytes, but its index says {needed}: truncated or of another index")
        self._tokens = np.memmap(binary, self.dtype, "r") if needed else np.zeros(0, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Token ids [length] of a document from ``start``, in the stored dtype."""
        first = int(self._offsets[document]) // self.dtype.itemsize
        stop = int(self.lengths[document]) if length is None else start + length
        assert 0 <= start <= stop <= self.lengths[document]
        return self._tokens[first + start : first + stop]


def _paths(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")
