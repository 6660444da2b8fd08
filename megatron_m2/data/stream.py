"""Endless, deterministic, exactly resumable batches: weighted blends of documents packed into token forests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_m2.data.indexed import IndexedDataset
from megatron_m2.forest import TokenForest


@dataclass(frozen=True)
class Piece:
    """One chain: ``length`` tokens of a document from ``start``. Its first token is input only: a document's bos, or the last token of
    the piece before, so that every other token of a document is predicted exactly once."""

    dataset: str
    document: int
    start: int
    length: int


class _Shuffled:
    """The documents of one dataset in a new order every epoch, drawn from (seed, number of the dataset, epoch) alone."""

    def __init__(self, lengths: np.ndarray, seed: int, number: int) -> None:
        # a document of one token has nothing to predict
        self.usable = np.flatnonzero(lengths >= 2)
        self.seed, self.number = seed, number
        self.epoch, self.position = 0, 0
        self._order = self._shuffle()

    def _shuffle(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.number, self.epoch]).permutation(self.usable)

    def next(self) -> int:
        if self.position == len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._shuffle()
        self.position += 1
        return int(self._order[self.position - 1])

    def seek(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._order = self._shuffle()


class ForestStream:
    """Forests of exactly ``tokens_per_forest`` tokens, from weighted datasets.

    The next document is taken from the dataset that lies furthest below its share of the tokens so far, which keeps every share within
    one document of its weight; a dataset smaller than its share is repeated, in another order. ``open_documents`` documents are read side
    by side, one chain of each in turn, so that a long one does not fill forest after forest by itself. Documents are cut to chains of at
    most ``seq_len``, and where a forest is full; the rest follows when the document's turn comes again. Where one place is left, it takes the first token of what
    follows, as a root that predicts nothing. Planning looks at lengths only, so a rank skips the forests of others without reading them.

    Args:
        weights: dataset name to its share (they need not sum to 1).
        open_documents: 1 reads each document to its end before the next.
        rank, world: this stream yields forests rank, rank + world, ... of the one order that all ranks share. After the same number of
            forests every rank has the same position, which another number of ranks can go on from.

    Raises:
        ValueError: a weight without a dataset, negative or all zero; a dataset with nothing to predict; sizes below 2; a rank outside
            its world.
    """

    def __init__(self, datasets: Mapping[str, IndexedDataset], weights: Mapping[str, float], *, tokens_per_forest: int, seq_len: int,
                 seed: int, open_documents: int = 1, rank: int = 0, world: int = 1) -> None:
        for name, weight in weights.items():
            if name not in datasets:
                raise ValueError(f"data.blend.{name}: no such dataset; there are {', '.join(sorted(datasets))}")
            if not 0 <= weight < float("inf"):
                raise ValueError(f"data.blend.{name} = {weight}: must be at least 0 and finite")
        self.weights = {name: float(w) for name, w in weights.items() if w > 0}
        if not self.weights:
            raise ValueError(f"data.blend = {dict(weights)}: at least one weight must be positive")
        _check_sizes(tokens_per_forest, seq_len)
        if open_documents < 1:
            raise ValueError(f"data.open_documents = {open_documents}: must be at least 1")
        if not 0 <= rank < world:
            raise ValueError(f"rank = {rank}: must be at least 0 and below the {world} ranks")
        self.datasets = datasets
        self.tokens_per_forest, self.seq_len, self.rank, self.world = tokens_per_forest, seq_len, rank, world
        self._sources = {name: _Shuffled(datasets[name].lengths, seed, i) for i, name in enumerate(sorted(self.weights))}
        for name, source in self._sources.items():
            if len(source.usable) == 0:
                raise ValueError(f"data.blend.{name}: no document of at least 2 tokens")
        self.drawn = dict.fromkeys(self.weights, 0)  # tokens of the documents taken so far
        self.forests = 0  # planned so far, of all ranks
        self._open: list[Piece | None] = [None] * open_documents  # what is left of each document being read
        self._turn = 0  # whose chain comes next
        # a position means the same documents only under these
        self._made_with = {"seed": seed, "blend": self.weights, "open_documents": open_documents,
                           "documents": {name: [len(s.usable), int(datasets[name].lengths.sum())] for name, s in self._sources.items()}}

    def __iter__(self) -> Iterator[TokenForest]:
        return self

    def __next__(self) -> TokenForest:
        plans = [self.plan() for _ in range(self.world)]
        return self.build(plans[self.rank])

    def plan(self) -> list[Piece]:
        """The pieces of the next forest in the common order."""
        pieces, room = [], self.tokens_per_forest
        while room > 0:
            rest = self._open[self._turn] or self._draw()
            take = min(rest.length, self.seq_len, room)
            pieces.append(Piece(rest.dataset, rest.document, rest.start, take))
            left = rest.length - take + 1  # the last token taken is the first of what follows
            self._open[self._turn] = Piece(rest.dataset, rest.document, rest.start + take - 1, left) if left >= 2 else None
            self._turn = (self._turn + 1) % len(self._open)
            room -= take
        self.forests += 1
        return pieces

    def _draw(self) -> Piece:
        """The next whole document, from the dataset furthest below its share."""
        name = min(self.weights, key=lambda n: (self.drawn[n] / self.weights[n], n))
        document = self._sources[name].next()
        length = int(self.datasets[name].lengths[document])
        self.drawn[name] += length
        return Piece(name, document, 0, length)

    def build(self, pieces: list[Piece]) -> TokenForest:
        """Reads the tokens of a plan."""
        return TokenForest.from_documents([self.datasets[p.dataset].read(p.document, p.start, p.length) for p in pieces])

    def state_dict(self) -> dict[str, Any]:
        """The exact position, as plain values."""
        return {"made_with": self._made_with, "forests": self.forests, "drawn": dict(self.drawn), "turn": self._turn,
                "open": [None if p is None else [p.dataset, p.document, p.start, p.length] for p in self._open],
                "sources": {name: [s.epoch, s.position] for name, s in self._sources.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a position of a stream over the same documents, weights and seed; sizes may differ from here on.

        Raises:
            ValueError: the position is of another stream.
        """
        for field, value in self._made_with.items():
            if state["made_with"][field] != value:
                raise ValueError(f"data: the saved position is of {field} = {state['made_with'][field]}, this stream has {value}")
        self.forests, self.drawn = state["forests"], dict(state["drawn"])
        self._open = [None if p is None else Piece(*p) for p in state["open"]]
        self._turn = state["turn"]
        for name, (epoch, position) in state["sources"].items():
            self._sources[name].seek(epoch, position)


def held_out_forests(dataset: IndexedDataset, documents: int, tokens_per_forest: int, seq_len: int) -> Iterator[TokenForest]:
    """The first ``documents`` documents once, in order, cut to chains of at most ``seq_len`` that overlap by one token: every token but
    a document's first is predicted exactly once. Forests have at most ``tokens_per_forest`` tokens.

    Raises:
        ValueError: sizes below 2.
    """
    _check_sizes(tokens_per_forest, seq_len)
    parts: list[np.ndarray] = []
    room = tokens_per_forest
    limit = min(seq_len, tokens_per_forest)
    for document in range(documents):
        ids = dataset.read(document)
        for start in range(0, len(ids) - 1, limit - 1):
            piece = ids[start : start + limit]
            if len(piece) > room:
                yield TokenForest.from_documents(parts)
                parts, room = [], tokens_per_forest
            parts.append(piece)
            room -= len(piece)
    if parts:
        yield TokenForest.from_documents(parts)


def _check_sizes(tokens_per_forest: int, seq_len: int) -> None:
    for field, value in (("tokens_per_forest", tokens_per_forest), ("seq_len", seq_len)):
        if value < 2:
            raise ValueError(f"data.{field} = {value}: must be at least 2")
