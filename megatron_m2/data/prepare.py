"""Documents to a prepared folder: split, tokenizer, indexed datasets, manifest. Everything appears at once or not at all."""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_m2.data.corpus import Document
from megatron_m2.data.dataset import MANIFEST, Dataset
from megatron_m2.data.indexed import write_indexed
from megatron_m2.data.spool import Spool, split_documents
from megatron_m2.data.tokenizer import Tokenizer, check_vocab_size, o200k_tokenizer, train_tokenizer

_FORMAT = 2  # of the prepared folder; a folder of another is made anew
_SAMPLE_CHARACTERS = 12_000_000  # of text that a tokenizer is trained on
_BATCH = 512  # documents tokenised at a time
_OURS = re.compile(r"manifest\.json|tokenizer\.json|tokenizer_config\.json|heldout\.txt|\w+_(train|heldout)\.(bin|idx)")


@dataclass(frozen=True)
class PrepareConfig:
    """What a prepared folder is made of; the same values find it already made.

    Attributes:
        sources: as given on the command line.
        tokenizer: "bpe" to train one of ``vocab_size``, "o200k", or a folder with a tokenizer.json.
        held_out: share of each dataset's bytes kept for evaluation.
        held_out_bytes: and at most so many per dataset.
        jsonl_field: of the text in JSONL sources.
    """

    sources: tuple[str, ...]
    tokenizer: str = "bpe"
    vocab_size: int = 8192
    held_out: float = 0.02
    held_out_bytes: int = 500_000
    jsonl_field: str = "text"

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out = {self.held_out}: must be at least 0 and below 1")
        if self.held_out_bytes < 0:
            raise ValueError(f"held_out_bytes = {self.held_out_bytes}: must be at least 0")
        if self.tokenizer == "bpe":
            check_vocab_size(self.vocab_size)

    def key(self) -> dict[str, object]:
        """As it stands in the manifest."""
        return {"format": _FORMAT, **asdict(self), "sources": list(self.sources)}


def is_prepared(folder: Path, config: PrepareConfig) -> bool:
    """Whether ``folder`` was made with these values and is undamaged."""
    try:
        dataset = Dataset(folder)
        dataset.tokenizer()
    except ValueError:
        return False
    return bool(dataset.manifest.get("made_with") == config.key())


def prepare(folder: Path, documents: Iterable[Document], config: PrepareConfig) -> dict[str, object]:
    """Writes the prepared folder, in the place of an older one, and returns its manifest.

    Raises:
        ValueError: no text in the sources, what the tokenizer refuses, or a folder that holds anything else.
    """
    given = None if config.tokenizer == "bpe" else _given_tokenizer(config.tokenizer)
    with _replacing(folder) as writing, tempfile.TemporaryFile(dir=writing) as file:
        spool = Spool(file)
        for document in tqdm(documents, desc="reading", unit=" documents", leave=False, disable=None):  # None: on a terminal only
            spool.add(document)
        splits = {kind: split_documents(sizes, config.held_out, config.held_out_bytes) for kind, sizes in spool.sizes().items()}
        if not splits:
            raise ValueError(f"no text found in {', '.join(config.sources)}")
        tokenizer = given or train_tokenizer(_sample(spool, [train for train, _ in splits.values()]), config.vocab_size)
        tokenizer.save(writing)
        manifest: dict[str, object] = {"made_with": config.key(), "vocab_size": tokenizer.vocab_size}
        total = sum(sum(sizes.values()) for sizes in spool.sizes().values())
        with tqdm(total=total, desc="tokenising", unit="B", unit_scale=True, disable=None) as bar:
            manifest["datasets"] = {kind: _write_dataset(writing / kind, spool, *split, tokenizer, bar) for kind, split in splits.items()}
        held_out = "".join(spool.read(d) for _, held_out in splits.values() for d in held_out).encode()
        (writing / "heldout.txt").write_bytes(held_out)
        manifest["xz_bytes"] = len(lzma.compress(held_out, preset=9))
        (writing / MANIFEST).write_text(json.dumps(manifest))
    return manifest


def _given_tokenizer(name: str) -> Tokenizer:
    return o200k_tokenizer() if name == "o200k" else Tokenizer.load(name)


def _sample(spool: Spool, trains: list[list[bytes]]) -> Iterator[str]:
    """The first training documents (their order is by content), as much text of every kind."""
    for train in trains:
        room = _SAMPLE_CHARACTERS // len(trains)
        for digest in train:
            if room <= 0:
                break
            text = spool.read(digest)[:room]
            yield text
            room -= len(text)


def _write_dataset(prefix: Path, spool: Spool, train: list[bytes], held_out: list[bytes], tokenizer: Tokenizer, bar: tqdm
                   ) -> dict[str, object]:
    def tokenised(digests: list[bytes]) -> Iterator[list[int]]:
        for start in range(0, len(digests), _BATCH):
            yield from tokenizer.encode_documents([spool.read(d) for d in digests[start : start + _BATCH]])
            bar.update(sum(sizes[d] for d in digests[start : start + _BATCH]))

    sizes = spool.sizes()[prefix.name]
    held_out_sizes = [sizes[d] for d in held_out]
    return {"train_documents": len(train), "train_bytes": sum(sizes[d] for d in train),
            "train_tokens": write_indexed(f"{prefix}_train", tokenised(train), tokenizer.vocab_size),
            "heldout_documents": len(held_out), "heldout_bytes": sum(held_out_sizes),
            "heldout_tokens": write_indexed(f"{prefix}_heldout", tokenised(held_out), tokenizer.vocab_size),
            "heldout_document_bytes": held_out_sizes}


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of ``folder`` when all went well and is removed when not.

    Raises:
        ValueError: ``folder`` holds something that is not of a prepared folder and would be lost.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose a new folder")
    strangers = [p.name for p in folder.iterdir() if not _OURS.fullmatch(p.name)] if folder.exists() else []
    if strangers:
        raise ValueError(f"{folder}: holds {min(strangers)}, which is not of prepared data; choose a new or empty folder")
    writing, old = folder.with_name(folder.name + ".preparing"), folder.with_name(folder.name + ".old")
    for left_over in (writing, old):
        if left_over.exists():
            shutil.rmtree(left_over)
    writing.mkdir(parents=True)
    try:
        yield writing
        if folder.exists():
            os.rename(folder, old)
        os.rename(writing, folder)
    except BaseException:
        shutil.rmtree(writing)
        raise
    if old.exists():
        shutil.rmtree(old)
