"""Indexed files: our own round trip, both directions with NVIDIA's Megatron, and one clear line for every damage."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_m2.data.indexed import IndexedDataset, token_dtype, write_indexed

with warnings.catch_warnings(action="ignore"):  # that neither Transformer Engine nor apex is here
    from megatron.core.datasets import indexed_dataset as megatron

DOCUMENTS = [[1, 2, 3], [7], [], [5, 4, 3, 2, 1]]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_indexed(tmp_path / "text", DOCUMENTS, 100)
    return tmp_path / "text"


@given(documents=st.lists(st.lists(st.integers(0, 65_498), max_size=20), max_size=12),
       vocab_size=st.sampled_from([65_499, 65_500, 200_064]))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab_size: int) -> None:
    prefix = tmp_path_factory.mktemp("indexed") / "text"
    assert write_indexed(prefix, documents, vocab_size) == sum(map(len, documents))
    dataset = IndexedDataset(prefix)
    assert dataset.dtype == (np.int32 if vocab_size >= 65_500 else np.uint16)
    assert [dataset.read(i).tolist() for i in range(len(dataset))] == documents
    assert dataset.lengths.tolist() == [len(d) for d in documents]


def test_part_of_a_document(prefix: Path) -> None:
    dataset = IndexedDataset(prefix)
    assert dataset.read(3, 1, 3).tolist() == [4, 3, 2]
    assert dataset.read(3, 4).tolist() == [1]
    assert dataset.read(2).tolist() == []


@pytest.mark.parametrize("vocab_size", [100, 200_064])
def test_megatron_reads_ours(tmp_path: Path, vocab_size: int) -> None:
    documents = [*DOCUMENTS, [vocab_size - 1]]
    write_indexed(tmp_path / "ours", documents, vocab_size)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == documents
    assert theirs.document_indices.tolist() == list(range(len(documents) + 1))
    assert theirs.index.dtype == token_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)


@pytest.mark.parametrize("vocab_size", [100, 200_064])
def test_same_bytes_as_megatron_and_back(tmp_path: Path, vocab_size: int) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=megatron.DType.optimal_dtype(vocab_size))
    for document in DOCUMENTS:
        builder.add_item(torch.tensor(document, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = IndexedDataset(tmp_path / "theirs")
    assert [ours.read(i).tolist() for i in range(len(ours))] == DOCUMENTS
    write_indexed(tmp_path / "ours", DOCUMENTS, vocab_size)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """What Megatron's ``--split-sentences`` writes: a document is all its sequences."""
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_document(torch.tensor([6]), [1])
    builder.finalize(str(tmp_path / "m.idx"))
    dataset = IndexedDataset(tmp_path / "m")
    assert [dataset.read(i).tolist() for i in range(len(dataset))] == [[1, 2, 3, 4, 5], [6]]


def patched(path: Path, offset: int, raw: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(raw)] = raw
    path.write_bytes(content)


@pytest.mark.parametrize(("suffix", "offset", "raw", "message"), [
    (".idx", 0, b"X", r"text\.idx: not an indexed dataset \(bad magic\)"),
    (".idx", 9, struct.pack("<Q", 2), r"text\.idx: version 2 with dtype code 8"),
    (".idx", 17, b"\x07", r"text\.idx: version 1 with dtype code 7"),
    (".idx", 18, struct.pack("<Q", 1 << 40), r"text\.idx: \d+ bytes, but 1099511627776 sequences need"),
    (".idx", 34, struct.pack("<i", -3), r"text\.idx: sequences do not lie back to back"),
    (".idx", 34 + 4 * 4 + 8, struct.pack("<q", 8), r"text\.idx: sequences do not lie back to back"),
    (".idx", 34 + 12 * 4 + 8 * 4, struct.pack("<q", 3), r"text\.idx: document boundaries do not cover its 4 sequences"),
])
def test_damage_is_named(prefix: Path, suffix: str, offset: int, raw: bytes, message: str) -> None:
    patched(prefix.with_name(prefix.name + suffix), offset, raw)
    with pytest.raises(ValueError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_every_truncation_is_noticed(prefix: Path, suffix: str) -> None:
    path = prefix.with_name(prefix.name + suffix)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"text\{suffix}: "):
            IndexedDataset(prefix)
    path.unlink()
    with pytest.raises(ValueError, match=rf"text\{suffix}: no such file"):
        IndexedDataset(prefix)


def test_multimodal_is_refused(prefix: Path) -> None:
    with open(prefix.with_name("text.idx"), "ab") as f:
        f.write(bytes(len(DOCUMENTS)))
    with pytest.raises(ValueError, match=r"text\.idx: multimodal"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("wrong", [100, -1])
def test_an_id_outside_the_vocabulary(tmp_path: Path, wrong: int) -> None:
    with pytest.raises(ValueError, match="document 1 has an id outside the vocabulary of 100"):
        write_indexed(tmp_path / "text", [[1], [2, wrong]], 100)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_the_old_files(prefix: Path) -> None:
    def fails() -> Iterator[list[int]]:
        yield [9] * 1000
        raise OSError("disk full")

    before = {p.name: p.read_bytes() for p in prefix.parent.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        write_indexed(prefix, fails(), 100)
    assert {p.name: p.read_bytes() for p in prefix.parent.iterdir()} == before
