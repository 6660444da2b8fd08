"""Documents to a prepared folder: split, tokenizer, indexed datasets, manifest. Everything appears at once or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_m2.data.corpus import Document
from megatron_m2.data.dataset import MANIFEST
from megatron_m2.data.indexed import write_indexed
from megatron_m2.data.tokenizer import Tokenizer, o200k_tokenizer, train_tokenizer

_FORMAT = 1  # of the prepared folder; a folder of another is made anew
_SAMPLE_BYTES = 12_000_000  # of text that a tokenizer is trained on
_BATCH = 512  # documents tokenised at a time


@dataclass(frozen=True)
class PrepareConfig:
    """What a prepared folder is made of; the same values find it already made.

    Attributes:
        sources: as given on the command line.
        tokenizer: "bpe" to train one of ``vocab_size``, "o200k", or a folder with a tokenizer.json.
        held_out: share of each dataset's bytes kept for evaluation.
        held_out_bytes: and at most so many per dataset.
    """

    sources: tuple[str, ...]
    tokenizer: str = "bpe"
    vocab_size: int = 8192
    held_out: float = 0.02
    held_out_bytes: int = 500_000
    jsonl_field: str = "text"

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"--held-out = {self.held_out}: must be at least 0 and below 1")

    def key(self) -> dict[str, object]:
        return json.loads(json.dumps({"format": _FORMAT, **asdict(self)}))


def is_prepared(folder: Path, config: PrepareConfig) -> bool:
    """Whether ``folder`` is complete and was made with these values."""
    try:
        return bool(json.loads((folder / MANIFEST).read_text())["made_with"] == config.key())
    except (OSError, json.JSONDecodeError, KeyError):
        return False


@dataclass
class _Split:
    train: list[str]
    held_out: list[str]


def split_documents(documents: Iterable[Document], share: float, most_bytes: int) -> dict[str, _Split]:
    """Per kind, exact duplicates dropped, in order of content hash: the first documents that fit are held out, the rest trains.

    The order depends on the content alone, so the same text is split the same way on every machine. A document that alone would take
    more than a fifth of the held-out bytes stays in training, so that no single one decides the evaluation.
    """
    by_kind: dict[str, dict[bytes, str]] = {}
    for d in documents:
        by_kind.setdefault(d.kind, {})[hashlib.sha256(d.text.encode()).digest()] = d.text
    splits = {}
    for kind, texts in sorted(by_kind.items()):
        budget = min(most_bytes, int(share * sum(len(t.encode()) for t in texts.values())))
        split, room = _Split([], []), budget
        for _, text in sorted(texts.items()):
            size = len(text.encode())
            if size <= room and size <= max(budget // 5, 1):
                split.held_out.append(text)
                room -= size
            else:
                split.train.append(text)
        splits[kind] = split
    return splits


def prepare(folder: Path, documents: Iterable[Document], config: PrepareConfig) -> dict[str, object]:
    """Writes the prepared folder and returns its manifest.

    Raises:
        ValueError: no text in the sources, or what the tokenizer refuses.
    """
    splits = split_documents(documents, config.held_out, config.held_out_bytes)
    if not any(s.train for s in splits.values()):
        raise ValueError(f"no text found in {', '.join(config.sources)}")
    with _replacing(folder) as writing:
        tokenizer = _make_tokenizer(config, splits)
        tokenizer.save(writing)
        manifest: dict[str, object] = {"made_with": config.key(), "vocab_size": tokenizer.vocab_size}
        total = sum(len(t) for s in splits.values() for t in (*s.train, *s.held_out))
        with tqdm(total=total, unit="chars", unit_scale=True, desc="tokenising") as bar:
            manifest["datasets"] = {kind: _write_dataset(writing, kind, split, tokenizer, bar) for kind, split in splits.items()}
        held_out = "".join(t for s in splits.values() for t in s.held_out).encode()
        (writing / "heldout.txt").write_bytes(held_out)
        manifest["xz_bytes"] = len(lzma.compress(held_out, preset=9))
        (writing / MANIFEST).write_text(json.dumps(manifest))
    return manifest


def _make_tokenizer(config: PrepareConfig, splits: dict[str, _Split]) -> Tokenizer:
    if config.tokenizer == "o200k":
        return o200k_tokenizer()
    if config.tokenizer != "bpe":
        return Tokenizer.load(config.tokenizer)
    return train_tokenizer(_sample(splits), config.vocab_size)


def _sample(splits: dict[str, _Split]) -> Iterator[str]:
    """The first training documents (their order is by content hash), as many bytes of every kind."""
    for split in splits.values():
        room = _SAMPLE_BYTES // len(splits)
        for text in split.train:
            if room <= 0:
                break
            yield text
            room -= len(text)


def _write_dataset(folder: Path, kind: str, split: _Split, tokenizer: Tokenizer, bar: tqdm) -> dict[str, object]:
    def tokenised(texts: list[str]) -> Iterator[list[int]]:
        for start in range(0, len(texts), _BATCH):
            batch = texts[start : start + _BATCH]
            yield from tokenizer.encode_documents(batch)
            bar.update(sum(len(t) for t in batch))

    vocab_size = tokenizer.vocab_size
    sizes = [len(t.encode()) for t in split.held_out]
    return {"train_documents": len(split.train), "train_bytes": sum(len(t.encode()) for t in split.train),
            "train_tokens": write_indexed(folder / f"{kind}_train", tokenised(split.train), vocab_size),
            "heldout_documents": len(split.held_out), "heldout_bytes": sum(sizes),
            "heldout_tokens": write_indexed(folder / f"{kind}_heldout", tokenised(split.held_out), vocab_size),
            "heldout_document_bytes": sizes}


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of ``folder`` when all went well and is removed when not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    writing, old = folder.with_name(folder.name + ".preparing"), folder.with_name(folder.name + ".old")
    for left_over in (writing, old):
        shutil.rmtree(left_over, ignore_errors=True)
    writing.mkdir()
    try:
        yield writing
        if folder.exists():
            os.rename(folder, old)
        os.rename(writing, folder)
    finally:
        for done_with in (writing, old):
            shutil.rmtree(done_with, ignore_errors=True)
