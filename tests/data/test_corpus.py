"""Sources: folders without twins, JSONL, Debian packages (built here, and behind a stand-in for apt-get)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_m2.data import corpus
from megatron_m2.data.corpus import Document, debian_documents, folder_documents, jsonl_documents

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb builds the package of this test")


def tree(folder: Path, **files: str) -> Path:
    """Writes files; ``__`` in a name is a slash and ``_`` a dot."""
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_folder(tmp_path: Path) -> None:
    tree(tmp_path, b_py="code", a__x_md="prose", a__y_html="<p>page</p>", skipped__z_md="no", _git__config_txt="no", _hidden_md="no")
    (tmp_path / "link.md").symlink_to(tmp_path / "a" / "x.md")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    assert list(folder_documents(tmp_path, frozenset({"skipped"}))) == [
        Document("code", "code"), Document("prose", "prose"), Document("prose", "page\n")]


def test_made_pages_are_left_out(tmp_path: Path) -> None:
    """A page and the text it was made of would stand on both sides of the split."""
    tree(tmp_path / "names", html__one_html="<p>1</p>", markdown__one_md="1", html__two_html="<p>2</p>", man1__one_1=".SH N")
    assert sorted(d.text for d in folder_documents(tmp_path / "names")) == ["1", "2\n"]
    tree(tmp_path / "code", page_html="<p>page</p>", page_py="code")
    assert sorted(d.text for d in folder_documents(tmp_path / "code")) == ["code", "page\n"]
    sphinx = tree(tmp_path / "sphinx", html__index_html="<p>i</p>", html__other_html="<p>o</p>")
    (sphinx / "html" / "_sources").mkdir()
    (sphinx / "html" / "_sources" / "index.rst.txt").write_text("i")
    assert [d.text for d in folder_documents(sphinx)] == ["i"]


def test_standard_library() -> None:
    documents = corpus.stdlib_documents()
    assert next(documents) == next(corpus.stdlib_documents())
    assert any("def " in d.text for d in [next(documents) for _ in range(20)])


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "id": 1}\n\n{"text": " "}\n{"text": "zwei \\u00fc"}\n')
    assert [d.text for d in jsonl_documents(path, "text")] == ["one", "zwei ü"]


@pytest.mark.parametrize(("line", "reason"), [
    (b'{"text": "cut', "Invalid control character at"),
    (b'{"other": "x"}', "KeyError: 'text'"),
    (b"[1, 2]", "TypeError"),
    (b"17", "TypeError"),
    (b'{"text": 5}', "TypeError: that is int"),
    (b'{"text": "\\ud800"}', "UnicodeEncodeError"),
    (b'{"text": "caf\xe9"}', "UnicodeDecodeError"),
])
def test_bad_jsonl_lines(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not a JSON object with text in 'text' \(" + reason) as error:
        list(jsonl_documents(path, "text"))
    assert "\n" not in str(error.value)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A Debian package with one text."""
    root = tree(tmp_path / "root", usr__share__doc__tiny__guide_txt="A guide.\n", DEBIAN__control="")
    (root / "DEBIAN" / "control").write_text("Package: tiny-doc\nVersion: 1\nArchitecture: all\nMaintainer: x <x@y.z>\nDescription: x\n")
    subprocess.run(["dpkg-deb", "--build", str(root), str(tmp_path / "tiny-doc_1_all.deb")], check=True, capture_output=True)
    return tmp_path / "tiny-doc_1_all.deb"


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An apt-get that does what ``script`` says, before any real one on the path."""
    folder.mkdir()
    (folder / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    corpus._update_lists.cache_clear()


@needs_dpkg
def test_package(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path / "bin", monkeypatch, f'echo "$1" >> {tmp_path}/calls; cp {package} .')
    for _ in range(2):  # the second time it lies there
        assert [d.text for d in debian_documents("tiny-doc", tmp_path / "downloads")] == ["A guide.\n"]
    assert (tmp_path / "calls").read_text().split() == ["download"]
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == ["tiny-doc_1_all.deb"]


@needs_dpkg
def test_package_lists_are_fetched_once(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    lists = tmp_path / "lists"
    stand_in(tmp_path / "bin", monkeypatch, f"""echo "$1" >> {tmp_path}/calls
        if [ "$1" = update ]; then touch {lists}; exit 0; fi
        case "$*" in *tiny-doc*) [ -e {lists} ] && exec cp {package} .;; esac
        echo "W: noise" >&2; echo "E: Unable to locate package" >&2; exit 100""")
    assert len(list(debian_documents("tiny-doc", tmp_path / "downloads"))) == 1
    with pytest.raises(corpus.Unavailable, match=r"^E: Unable to locate package$"):
        list(debian_documents("absent", tmp_path / "downloads"))
    assert (tmp_path / "calls").read_text().split() == ["download", "update", "download", "download", "download"]


@needs_dpkg
def test_package_cut_short(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    downloads = tmp_path / "downloads"
    stand_in(tmp_path / "bin", monkeypatch, f"head -c 100 {package} > tiny-doc_1_all.deb; echo 'E: Connection failed' >&2; exit 100")
    with pytest.raises(corpus.Unavailable, match="E: Connection failed"):
        list(debian_documents("tiny-doc", downloads))
    assert list(downloads.iterdir()) == []
    shutil.copy(package, downloads)
    os.truncate(downloads / package.name, 100)
    with pytest.raises(corpus.Unavailable, match="dpkg-deb"):
        list(debian_documents("tiny-doc", downloads))


def test_no_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(corpus.Unavailable, match="no apt-get on this machine"):
        list(debian_documents("tiny-doc", tmp_path))
