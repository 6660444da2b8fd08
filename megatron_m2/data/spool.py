"""Distinct documents on disk while a corpus is prepared, so that it may be larger than memory; and their split by content."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping
from typing import BinaryIO

from megatron_m2.data.corpus import Document


class Spool:
    """Documents by the SHA-256 of their text, which drops exact duplicates whatever their kind. Texts lie in ``file``."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = 0
        self._places: dict[bytes, tuple[str, int, int]] = {}  # digest to kind, offset, bytes

    def add(self, document: Document) -> None:
        raw = document.text.encode()
        digest = hashlib.sha256(raw).digest()
        if digest not in self._places:
            self._file.write(raw)
            self._places[digest] = (document.kind, self._end, len(raw))
            self._end += len(raw)

    def read(self, digest: bytes) -> str:
        _, start, size = self._places[digest]
        self._file.seek(start)
        return self._file.read(size).decode()

    def sizes(self) -> dict[str, dict[bytes, int]]:
        """Bytes of every document, by kind and digest."""
        by_kind: dict[str, dict[bytes, int]] = {}
        for digest, (kind, _, size) in self._places.items():
            by_kind.setdefault(kind, {})[digest] = size
        return dict(sorted(by_kind.items()))


def split_documents(sizes: Mapping[bytes, int], share: float, most_bytes: int) -> tuple[list[bytes], list[bytes]]:
    """Splits documents into training and held-out ones, each in order of digest.

    The first documents in that order are held out while they fit: it depends on the content alone, so the same text is split the same
    way on every machine. A document of more than a fifth of the held-out bytes stays in training, so that no single one decides the
    evaluation, unless documents of the middle size are that long. Of two or more documents at least one is held out.

    Args:
        sizes: bytes by digest.
        share: of all bytes, to be held out.
        most_bytes: and at most so many.
    """
    order = sorted(sizes)
    budget = min(most_bytes, int(share * sum(sizes.values())))
    if budget <= 0 or len(order) < 2:
        return order, []
    longest = max(budget // 5, statistics.median_low(sizes.values()))
    held_out: dict[bytes, None] = {}
    room = budget
    for digest in order:
        if sizes[digest] > longest:
            continue
        if held_out and sizes[digest] > room:
            break
        held_out[digest] = None
        room -= sizes[digest]
    return [d for d in order if d not in held_out], list(held_out)
