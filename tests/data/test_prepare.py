"""A prepared folder from the command line: what is in it, that nothing leaks, nothing is half there, and every mistake is one line."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_m2.data import corpus, prepare
from megatron_m2.data.corpus import Document
from megatron_m2.data.dataset import Dataset
from megatron_m2.data.spool import Spool, split_documents
from tools import prepare_data
from tools.prepare_data import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.md").write_text(f"Chapter {i}. It was the {i}th day, and all was well.\n" * (1 + i % 5))
        (folder / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n")
    (folder / "copy.md").write_text((folder / "3.md").read_text())
    (folder / "copy.txt").write_text((folder / "5.py").read_text())
    return folder


def arguments(out: Path, *sources: str, **options: object) -> list[str]:
    given = [x for s in sources for x in ("--source", s)]
    more = [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    return ["--out", str(out), *given, "--vocab-size", "300", *more]


def error_of(capsys: pytest.CaptureFixture[str], args: list[str]) -> str:
    """The one line that a mistake gives."""
    assert main(args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_what_is_written(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "data"
    assert main(arguments(out, f"folder:{texts}", held_out=0.2)) == 0
    dataset = Dataset(out)
    tokenizer = dataset.tokenizer()
    stored: dict[str, list[str]] = {"train": [], "held_out": []}
    for side, datasets in (("train", dataset.train), ("held_out", dataset._held_out)):
        for name in ("code", "prose"):
            for i in range(len(datasets[name])):
                ids = datasets[name].read(i).tolist()
                assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
                stored[side].append(tokenizer.decode(ids))
    # every distinct text stands whole on one side, once
    every = stored["train"] + stored["held_out"]
    assert sorted(every) == sorted({p.read_text() for p in texts.iterdir()})
    assert len(stored["held_out"]) >= 4
    raw = (out / "heldout.txt").read_bytes()
    assert raw == "".join(stored["held_out"]).encode()
    assert dataset.xz_bits_per_byte() == 8 * len(lzma.compress(raw, preset=9)) / len(raw)
    for name, d in dataset.manifest["datasets"].items():
        assert d["train_tokens"] == dataset.train[name].lengths.sum()
        forests, num_bytes = dataset.held_out(name, 64, 16)
        assert num_bytes == d["heldout_bytes"] == sum(d["heldout_document_bytes"])
        assert sum(int(f.weight.sum()) for f in forests) == d["heldout_tokens"] - d["heldout_documents"]
    assert sorted(p.name for p in out.parent.iterdir()) == ["data"]
    capsys.readouterr()
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert main(arguments(out, f"folder:{texts}", held_out=0.2)) == 0
    assert "prepared already" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_made_anew(texts: Path, tmp_path: Path) -> None:
    """Other arguments or damage make it anew; the same sources give the same bytes."""
    out = tmp_path / "data"
    args = arguments(out, f"folder:{texts}")
    assert main(args) == 0
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    os.truncate(out / "prose_train.bin", 10)
    assert main(args) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    (out / "tokenizer.json").unlink()
    assert main(args) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    assert main(arguments(out, f"folder:{texts}", held_out=0)) == 0
    dataset = Dataset(out)
    assert dataset.manifest["datasets"]["prose"]["heldout_documents"] == 0
    with pytest.raises(ValueError, match="dataset prose has no held-out document"):
        dataset.held_out("prose", 64, 16)


def test_jsonl_and_a_given_tokenizer(texts: Path, tmp_path: Path) -> None:
    assert main(arguments(tmp_path / "first", f"folder:{texts}")) == 0
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": f"line {i}"}) + "\n" for i in range(9)))
    assert main(arguments(tmp_path / "data", f"jsonl:{tmp_path / 'a.jsonl'}", jsonl_field="body", tokenizer=tmp_path / "first")) == 0
    dataset = Dataset(tmp_path / "data")
    assert list(dataset.train) == ["prose"]
    assert len(dataset.train["prose"]) == 8
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() == (tmp_path / "first" / "tokenizer.json").read_bytes()
    forests, num_bytes = dataset.held_out("prose", 64, 16, max_tokens=1)
    assert num_bytes == 6
    assert len(list(forests)) == 1


def test_mistakes_are_one_line(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "binary" / "b.txt").write_bytes(bytes(range(256)))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "none.jsonl").write_text("\n")
    for source, message in [
        (f"folder:{tmp_path / 'empty'}", "no text in it (empty, or binary files only)"),
        (f"folder:{tmp_path / 'binary'}", "no text in it (empty, or binary files only)"),
        (f"folder:{tmp_path / 'missing'}", "no such folder"),
        (f"jsonl:{tmp_path / 'missing'}", "no such file"),
        (f"jsonl:{tmp_path / 'bad.jsonl'}", "bad.jsonl:2: not a JSON object"),
        (f"jsonl:{tmp_path / 'none.jsonl'}", "no text in it"),
        ("folder:", "must be stdlib, site-packages, deb:PACKAGE, folder:PATH or jsonl:FILE"),
        ("web", "must be stdlib"),
    ]:
        assert message in error_of(capsys, arguments(out, f"folder:{texts}", source)), source
    for options, message in [
        ({"vocab_size": 100}, "vocab_size = 100: must be at least 265"),
        ({"held_out": 1.0}, "held_out = 1.0: must be at least 0 and below 1"),
        ({"held_out_bytes": -1}, "held_out_bytes = -1"),
        ({"tokenizer": tmp_path / "empty"}, "tokenizer.json: no such file"),
    ]:
        assert message in error_of(capsys, arguments(out, f"folder:{texts}", **options))
    assert not list(tmp_path.glob("data*"))


def test_nothing_of_others_is_deleted(texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(texts.iterdir())
    assert "which is not of prepared data; choose a new or empty folder" in error_of(capsys, arguments(texts, f"folder:{texts}"))
    assert "is a file; choose a new folder" in error_of(capsys, arguments(texts / "0.md", f"folder:{texts}"))
    monkeypatch.chdir(texts)
    assert "which is not of prepared data" in error_of(capsys, arguments(Path("."), f"folder:{texts}"))
    assert sorted(texts.iterdir()) == before


def test_a_failure_keeps_what_was_there(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "data"
    assert main(arguments(out, f"folder:{texts}")) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "write_indexed", full)
    assert main(arguments(out, f"folder:{texts}", held_out=0.3)) == 2
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "texts"]


def test_killed_half_way(tmp_path: Path) -> None:
    """SIGKILL while it tokenises: no folder that could be taken for a prepared one, and the next run clears up."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} bottles of beer"}) + "\n" for i in range(2000)))
    args = arguments(tmp_path / "data", f"jsonl:{tmp_path / 'a.jsonl'}")
    slow = ("import sys, time; from megatron_m2.data import prepare; from tools.prepare_data import main;"
            "prepare.lzma.compress = lambda *a, **k: time.sleep(60); main(sys.argv[1:])")
    process = subprocess.Popen([sys.executable, "-c", slow, *args], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "data.preparing" / "heldout.txt").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with pytest.raises(ValueError, match=r"no manifest\.json here"):
        Dataset(tmp_path / "data")
    assert main(args) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "data"]
    Dataset(tmp_path / "data")


def test_default_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Packages that cannot be had are named, and installed sources fill up to the least size."""
    def package(name: str, downloads: Path) -> list[Document]:
        if name == "anarchism":
            raise corpus.Unavailable("no apt-get on this machine")
        return [Document("prose", f"about {name} " * 20)]

    monkeypatch.setattr(corpus, "debian_documents", package)
    monkeypatch.setattr(corpus, "stdlib_documents", lambda: [Document("code", f"a = {i}\n" * 9) for i in range(20)])
    monkeypatch.setattr(corpus, "site_packages_documents", lambda: (Document("code", f"b = {i}\n" * 9) for i in range(10**6)))
    monkeypatch.setattr(prepare_data, "DEFAULT_LEAST_BYTES", 20_000)
    assert main(["--out", str(tmp_path / "data"), "--vocab-size", "300"]) == 0
    err = capsys.readouterr().err
    assert "without anarchism: no apt-get on this machine" in err
    assert "adding the sources of installed packages" in err
    sizes = [d["train_bytes"] + d["heldout_bytes"] for d in Dataset(tmp_path / "data").manifest["datasets"].values()]
    assert 20_000 <= sum(sizes) < 21_000
    with pytest.raises(ValueError, match="--source deb:anarchism: no apt-get"):
        list(prepare_data.source_documents("deb:anarchism", tmp_path, "text"))
    assert len(list(prepare_data.source_documents("deb:vim-doc", tmp_path, "text"))) == 1
    assert len(list(prepare_data.source_documents("stdlib", tmp_path, "text"))) == 20
    assert next(prepare_data.source_documents("site-packages", tmp_path, "text")).text.startswith("b = 0")


def test_not_a_prepared_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest\.json here; make it with tools/prepare_data\.py --out"):
        Dataset(tmp_path)
    for damaged in ("{", "[]", '{"vocab_size": 9}', '{"vocab_size": 9, "datasets": {"code": {}}}'):
        (tmp_path / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
            Dataset(tmp_path)


def test_spool_drops_duplicates_of_any_kind() -> None:
    spool = Spool(io.BytesIO())
    for kind, text in (("code", "x"), ("prose", "ü"), ("code", "x"), ("prose", "x")):
        spool.add(Document(kind, text))
    sizes = spool.sizes()
    assert {kind: list(s.values()) for kind, s in sizes.items()} == {"code": [1], "prose": [2]}
    assert [spool.read(d) for s in sizes.values() for d in s] == ["x", "ü"]


@given(sizes=st.lists(st.integers(1, 1000), max_size=40), share=st.floats(0, 0.99), most=st.integers(0, 5000))
def test_split(sizes: list[int], share: float, most: int) -> None:
    by_digest = {hashlib.sha256(bytes([i])).digest(): size for i, size in enumerate(sizes)}
    train, held_out = split_documents(by_digest, share, most)
    assert sorted(train + held_out) == sorted(by_digest)
    budget = min(most, int(share * sum(sizes)))
    assert bool(held_out) == (budget > 0 and len(sizes) > 1)
    assert bool(train) == bool(sizes)
    assert len(held_out) <= 1 or sum(by_digest[d] for d in held_out) <= budget
    assert split_documents(dict(reversed(by_digest.items())), share, most) == (train, held_out)
