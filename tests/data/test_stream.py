"""Streams: every token predicted once per epoch, shares as asked, exact resume, ranks that share one order."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_m2.data.indexed import IndexedDataset, write_indexed
from megatron_m2.data.stream import ForestStream, held_out_forests
from megatron_m2.forest import TokenForest

Lengths = dict[str, list[int]]
lengths_of = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda lengths: max(lengths) >= 2)
blends = st.fixed_dictionaries({"a": lengths_of, "b": lengths_of})
sizes = st.fixed_dictionaries({"tokens_per_forest": st.integers(2, 40), "seq_len": st.integers(2, 20)})


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Datasets of given document lengths, in which every token of all datasets has its own id."""
    def build(lengths: Lengths) -> dict[str, IndexedDataset]:
        folder, ids = tmp_path_factory.mktemp("stream"), itertools.count()
        for name, each in lengths.items():
            write_indexed(folder / name, [list(itertools.islice(ids, n)) for n in each], 65_499)
        return {name: IndexedDataset(folder / name) for name in lengths}
    return build


def stream(datasets: dict[str, IndexedDataset], weights: dict[str, float] | None = None, **changes: Any) -> ForestStream:
    return ForestStream(datasets, weights or dict.fromkeys(datasets, 1.0), **{"tokens_per_forest": 16, "seq_len": 8, "seed": 0, **changes})


def predicted(forests: list[TokenForest]) -> list[int]:
    """The ids predicted, in order, each from the id before it."""
    ids: list[int] = []
    for f in forests:
        assert ((f.weight == 1) == (f.parent >= 0)).all()
        targets, parents = f.predictions()
        assert (f.tokens[targets] == f.tokens[parents] + 1).all()
        ids += f.tokens[targets].tolist()
    return ids


def same(a: TokenForest, b: TokenForest) -> bool:
    return all(bool((getattr(a, n) == getattr(b, n)).all()) for n in ("tokens", "parent", "depth", "subtree_end", "weight"))


def all_predictable(dataset: IndexedDataset) -> set[int]:
    return {int(t) for i in range(len(dataset)) for t in dataset.read(i)[1:]}


@given(lengths=lengths_of, size=sizes)
def test_each_epoch_predicts_every_token_once(make: Any, lengths: list[int], size: dict[str, int]) -> None:
    datasets = make({"a": lengths})
    forests = stream(datasets, **size)
    want = all_predictable(datasets["a"])
    seen: list[int] = []
    while len(seen) < 3 * len(want):
        forest = next(forests)
        forest.validate()
        assert len(forest) == size["tokens_per_forest"]
        assert int(forest.depth.max()) < size["seq_len"]
        seen += predicted([forest])
    for epoch in range(3):
        assert sorted(seen[epoch * len(want) :][: len(want)]) == sorted(want)


@given(lengths=blends, size=sizes, open_documents=st.integers(2, 9), forests=st.integers(1, 30))
def test_side_by_side_documents_lose_and_repeat_nothing(make: Any, lengths: Lengths, size: dict[str, int], open_documents: int, forests: int
                                                        ) -> None:
    """What was predicted and what is still open are together every document as often as it was drawn."""
    datasets = make(lengths)
    running = stream(datasets, open_documents=open_documents, **size)
    counts = Counter(predicted([next(running) for _ in range(forests)]))
    for name, reader in running.state_dict()["readers"].items():
        for document, start in filter(None, reader["open"]):
            counts.update(int(t) for t in datasets[name].read(document, start)[1:])
    for dataset in datasets.values():
        drawn = {frozenset(counts[int(t)] for t in dataset.read(i)[1:]) for i in range(len(dataset)) if dataset.lengths[i] >= 2}
        assert all(len(times) == 1 for times in drawn), "tokens of one document, different counts"
        times = [n for (n,) in drawn]
        assert max(times) - min(times) <= 1


def test_a_long_document_shares_its_forests(make: Any) -> None:
    forests = stream(make({"a": [400, 400, 400, 400]}), tokens_per_forest=32, seq_len=8, open_documents=4)
    assert all(len({int(t) // 400 for t in next(forests).tokens}) == 4 for _ in range(40))


def test_epochs_differ_and_depend_on_the_seed(make: Any) -> None:
    datasets = make({"a": [2] * 40})
    def order(seed: int, epochs: int) -> list[int]:
        forests = stream(datasets, tokens_per_forest=80, seed=seed)
        return [t for _ in range(epochs) for t in next(forests).tokens.tolist()]
    first, second = order(0, 2)[:80], order(0, 2)[80:]
    assert sorted(first) == sorted(second) == list(range(80))
    assert first != second
    assert order(1, 1) != first
    assert order(0, 1) == first


@given(lengths=blends, weights=st.fixed_dictionaries({"a": st.floats(0.05, 1), "b": st.floats(0.05, 1)}), size=sizes,
       lanes=st.integers(1, 9))
def test_shares_stay_within_one_chain(make: Any, lengths: Lengths, weights: dict[str, float], size: dict[str, int], lanes: int) -> None:
    datasets = make(lengths)
    forests = stream(datasets, weights, open_documents=lanes, **size)
    of_a = {int(t) for i in range(len(datasets["a"])) for t in datasets["a"].read(i)}
    seen = total = 0
    for _ in range(30):
        tokens = next(forests).tokens.tolist()
        seen, total = seen + sum(t in of_a for t in tokens), total + len(tokens)
        assert abs(seen - total * weights["a"] / sum(weights.values())) <= size["seq_len"]


def test_a_zero_weight_leaves_a_dataset_out(make: Any) -> None:
    forests = stream(make({"a": [5, 5], "b": [5, 5]}), {"a": 0.0, "b": 2.0})
    assert all(int(next(forests).tokens.min()) >= 10 for _ in range(10))


@given(lengths=blends, size=sizes, before=st.integers(0, 12), seed=st.integers(0, 3), lanes=st.integers(1, 5))
def test_resume_is_exact(make: Any, lengths: Lengths, size: dict[str, int], before: int, seed: int, lanes: int) -> None:
    datasets = make(lengths)
    running = stream(datasets, {"a": 0.3, "b": 0.7}, seed=seed, open_documents=lanes, **size)
    for _ in range(before):
        next(running)
    saved = json.loads(json.dumps(running.state_dict()))
    resumed = stream(datasets, {"a": 0.3, "b": 0.7}, seed=seed, open_documents=lanes, **size)
    resumed.load_state_dict(saved)
    for _ in range(12):
        assert same(next(running), next(resumed))
    assert running.state_dict() == resumed.state_dict()


@given(lengths=blends, size=sizes, world=st.integers(2, 4))
def test_ranks_share_one_order_and_one_position(make: Any, lengths: Lengths, size: dict[str, int], world: int) -> None:
    datasets = make(lengths)
    alone = stream(datasets, **size)
    ranks = [stream(datasets, rank=r, world=world, **size) for r in range(world)]
    for _ in range(4):
        for rank in ranks:
            assert same(next(rank), next(alone))
        assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


def test_ranks_read_only_their_own(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, read = make({"a": [16] * 8}), []
    monkeypatch.setattr(IndexedDataset, "read", lambda self, d, s, n: read.append(d) or np.zeros(n, np.int64))
    forests = stream(datasets, seq_len=16, rank=1, world=4)
    next(forests)
    next(forests)
    assert len(read) == 2


@pytest.mark.parametrize(("change", "field"), [
    ({"seed": 1}, "seed = 0"),
    ({"weights": {"a": 1.0}}, "blend = "),
    ({"open_documents": 3}, "open_documents = 1"),
    ({"data": [9, 9]}, "documents = "),
])
def test_a_position_of_another_stream_is_refused(make: Any, change: dict[str, Any], field: str) -> None:
    saved = stream(make({"a": [5, 5], "b": [7]})).state_dict()
    other = stream(make({"a": change.pop("data", [5, 5]), "b": [7]}), change.pop("weights", None), **change)
    with pytest.raises(ValueError, match=f"the saved position is of {field}"):
        other.load_state_dict(saved)


@pytest.mark.parametrize(("weights", "changes", "message"), [
    ({"a": -1.0}, {}, r"data\.blend\.a = -1\.0: must be at least 0"),
    ({"a": float("nan")}, {}, r"data\.blend\.a = nan"),
    ({"a": float("inf")}, {}, r"data\.blend\.a = inf"),
    ({"a": 0.0}, {}, "at least one weight must be positive"),
    ({}, {}, "at least one weight must be positive"),
    ({"c": 1.0}, {}, r"data\.blend\.c: no such dataset; there are a, empty"),
    ({"empty": 1.0}, {}, r"data\.blend\.empty: no document of at least 2 tokens"),
    ({"a": 1.0}, {"seq_len": 1}, r"data\.seq_len = 1: must be at least 2"),
    ({"a": 1.0}, {"tokens_per_forest": 1}, r"data\.tokens_per_forest = 1: must be at least 2"),
    ({"a": 1.0}, {"open_documents": 0}, r"data\.open_documents = 0: must be at least 1"),
    ({"a": 1.0}, {"rank": 2, "world": 2}, "rank = 2: must be at least 0 and below the 2 ranks"),
])
def test_bad_arguments(make: Any, weights: dict[str, float], changes: dict[str, Any], message: str) -> None:
    datasets = make({"a": [5], "empty": [1, 0]})
    with pytest.raises(ValueError, match=message):
        ForestStream(datasets, weights, **{"tokens_per_forest": 16, "seq_len": 8, "seed": 0, **changes})


@given(lengths=lengths_of, size=sizes)
def test_held_out_predicts_every_token_once(make: Any, lengths: list[int], size: dict[str, int]) -> None:
    dataset = make({"a": lengths})["a"]
    forests = list(held_out_forests(dataset, len(dataset), **size))
    assert all(len(f) <= size["tokens_per_forest"] and int(f.depth.max()) < size["seq_len"] for f in forests)
    assert sorted(predicted(forests)) == sorted(all_predictable(dataset))


def test_held_out_sizes(make: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.seq_len = 1"):
        next(held_out_forests(make({"a": [5]})["a"], 1, 8, 1))
