"""A prepared folder: the datasets, tokenizer and figures that ``tools/prepare_data.py`` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from megatron_m2.data.indexed import IndexedDataset
from megatron_m2.data.stream import ForestStream, held_out_forests
from megatron_m2.data.tokenizer import Tokenizer
from megatron_m2.forest import TokenForest

MANIFEST = "manifest.json"


class Dataset:
    """``folder`` holds ``NAME_train.{bin,idx}`` and ``NAME_heldout.{bin,idx}`` per dataset, tokenizer.json and manifest.json.

    Raises:
        ValueError: the folder is not a prepared one, or a file in it is damaged; the message names it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"data.path = {folder}: no {MANIFEST} here; make it with tools/prepare_data.py --out {folder}")
        try:
            self.manifest = json.loads(path.read_text())
            self.vocab_size: int = self.manifest["vocab_size"]
            self._held_out_bytes = {name: np.asarray(d["heldout_document_bytes"]) for name, d in self.manifest["datasets"].items()}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged: {type(error).__name__} {error}") from None
        self.train = {name: IndexedDataset(self.folder / f"{name}_train") for name in self._held_out_bytes}
        self._held_out = {name: IndexedDataset(self.folder / f"{name}_heldout") for name in self._held_out_bytes}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that these ids are of."""
        return Tokenizer.load(self.folder)

    def stream(self, blend: Mapping[str, float], *, tokens_per_forest: int, seq_len: int, seed: int,
               open_documents: int = 1, rank: int = 0, world: int = 1) -> ForestStream:
        """The training documents: see :class:`megatron_m2.data.stream.ForestStream`."""
        return ForestStream(self.train, blend, tokens_per_forest=tokens_per_forest, seq_len=seq_len, seed=seed,
                            open_documents=open_documents, rank=rank, world=world)

    def held_out(self, name: str, tokens_per_forest: int, seq_len: int, max_tokens: int = 0) -> tuple[Iterator[TokenForest], int]:
        """Held-out documents of a dataset and the bytes of their text.

        Args:
            max_tokens: take whole documents while they fit, at least one (0: all of them).

        Raises:
            ValueError: the dataset has none.
        """
        dataset = self._held_out[name]
        if len(dataset) == 0:
            raise ValueError(f"{self.folder}: dataset {name} has no held-out document; prepare it with a larger --held-out")
        documents = len(dataset)
        if max_tokens:
            documents = max(1, int(np.searchsorted(np.cumsum(dataset.lengths), max_tokens, side="right")))
        return held_out_forests(dataset, documents, tokens_per_forest, seq_len), int(self._held_out_bytes[name][:documents].sum())

    def xz_bits_per_byte(self) -> float:
        """What ``xz -9`` needs for all held-out text together."""
        num_bytes = sum(int(b.sum()) for b in self._held_out_bytes.values())
        return float(8 * self.manifest["xz_bytes"] / num_bytes)
