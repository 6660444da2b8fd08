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


class _Reader:
    """Chains of one dataset: some documents are read side by side, a chain of each in turn; when one ends, the next of the epoch takes its
    place. The order is new every epoch, drawn from (seed, number of the dataset, epoch) alone."""

    def __init__(self, name: str, lengths: np.ndarray, seed: int, number: int, open_documents: int) -> None:
        self.name, self.lengths, self.seed, self.number = name, lengths, seed, number
        # a document of one token has nothing to predict
        self.usable = np.flatnonzero(lengths >= 2)
        self.epoch, self.position, self.turn = 0, 0, 0
        self.open: list[tuple[int, int] | None] = [None] * open_documents  # document and where its next chain starts
        self._order = self._shuffle()

    def take(self, most: int) -> Piece:
        """The next chain, of at most ``most`` tokens."""
        document, start = self.open[self.turn] or (self._next_document(), 0)
        length = min(int(self.lengths[document]) - start, most)
        last = start + length - 1  # is the first token of what follows
        self.open[self.turn] = (document, last) if last + 1 < self.lengths[document] else None
        self.turn = (self.turn + 1) % len(self.open)
        return Piece(self.name, document, start, length)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "turn": self.turn,
                "open": [None if o is None else list(o) for o in self.open]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position, self.turn = state["epoch"], state["position"], state["turn"]
        self.open = [None if o is None else (o[0], o[1]) for o in state["open"]]
        self._order = self._shuffle()

    def _next_document(self) -> int:
        if self.position == len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._shuffle()
        self.position += 1
        return int(self._order[self.position - 1])

    def _shuffle(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.number, self.epoch]).permutation(self.usable)


class ForestStream:
    """Forests of exactly ``tokens_per_forest`` tokens, from weighted datasets.

    The next chain is taken from the dataset that lies furthest below its share of the tokens so far, so that none runs ahead of its
    share by more than a chain; a dataset smaller than its share is repeated, in another order. Of each dataset ``open_documents``
    documents are read side by side, a chain of each in turn, so that a long one does not fill forest after forest by itself. Documents
    are cut to chains of at most ``seq_len``, and where a forest is full; the rest follows when the document's turn comes again. Where
    one place is left, it takes the first token of what follows, as a root that predicts nothing. Planning looks at lengths only, so a
    rank skips the forests of others without reading them.

    Args:
        weights: dataset name to its share (they need not sum to 1).
        open_documents: per dataset; 1 reads each document to its end before the next.
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
        self._readers = {name: _Reader(name, datasets[name].lengths, seed, number, open_documents)
                         for number, name in enumerate(sorted(self.weights))}
        for name, reader in self._readers.items():
            if len(reader.usable) == 0:
                raise ValueError(f"data.blend.{name}: no document of at least 2 tokens")
        self.taken = dict.fromkeys(self.weights, 0)  # tokens in the forests planned so far
        self.forests = 0  # planned so far, of all ranks
        # a position means the same documents only under these
        self._made_with = {"seed": seed, "blend": self.weights, "open_documents": open_documents,
                           "documents": {name: [len(r.usable), int(r.lengths.sum())] for name, r in self._readers.items()}}

    def __iter__(self) -> Iterator[TokenForest]:
        return self

    def __next__(self) -> TokenForest:
        plans = [self.plan() for _ in range(self.world)]
        return self.build(plans[self.rank])

    def plan(self) -> list[Piece]:
        """The pieces of the next forest in the common order."""
        pieces, room = [], self.tokens_per_forest
        while room > 0:
            name = min(self.weights, key=lambda n: (self.taken[n] / self.weights[n], n))
            piece = self._readers[name].take(min(self.seq_len, room))
            pieces.append(piece)
            self.taken[name] += piece.length
            room -= piece.length
        self.forests += 1
        return pieces

    def build(self, pieces: list[Piece]) -> TokenForest:
        """Reads the tokens of a plan."""
        return TokenForest.from_documents([self.datasets[p.dataset].read(p.document, p.start, p.length) for p in pieces])

    def state_dict(self) -> dict[str, Any]:
        """The exact position, as plain values."""
        return {"made_with": self._made_with, "forests": self.forests, "taken": dict(self.taken),
                "readers": {name: reader.state_dict() for name, reader in self._readers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a position of a stream over the same documents, weights and seed; sizes may differ from here on.

        Raises:
            ValueError: the position is of another stream.
        """
        for field, value in self._made_with.items():
            if state["made_with"][field] != value:
                raise ValueError(f"data: the saved position is of {field} = {state['made_with'][field]}, this stream has {value}")
        self.forests, self.taken = state["forests"], dict(state["taken"])
        for name, reader in self._readers.items():
            reader.load_state_dict(state["readers"][name])


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
