"""Where text comes from: the standard library, Debian's documentation packages, folders, JSONL. Each source yields whole documents."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_m2.data.text import drop_boilerplate, is_html, is_man_page, kind_of, read_text


@dataclass(frozen=True)
class Document:
    """kind: "code" or "prose", which is the dataset it goes to."""

    kind: str
    text: str


class Unavailable(Exception):
    """A package cannot be had on this machine; the message says why."""


def folder_documents(folder: Path, skip: frozenset[str] = frozenset()) -> Iterator[Document]:
    """Every readable text below a folder, in order of path, pages of HTML last. Hidden files and folders, and links, are left out.

    HTML and man pages are left out where the text they were made of is there too (Sphinx's ``_sources``, or a text of the same name):
    twins in training and held-out text would flatter the evaluation.

    Args:
        skip: names of subfolders to leave out.
    """
    paths: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        paths += [Path(root) / f for f in sorted(files) if not f.startswith(".")]
    sources = {_stem(p) for p in paths if kind_of(p) == "prose" and not is_html(p) and not is_man_page(p)}
    has_sphinx = any("_sources" in p.parts for p in paths)
    pages = []
    for path in paths:
        made = is_html(path) or is_man_page(path)
        if path.is_symlink() or (made and _stem(path) in sources) or (has_sphinx and is_html(path)):
            continue
        found = read_text(path)
        if found and is_html(path):
            pages.append(found[1])
        elif found:
            yield Document(*found)
    for text in drop_boilerplate(pages):
        if text.strip():
            yield Document("prose", text)


def _stem(path: Path) -> str:
    """``append1`` of append1.md.gz and append1.html: the name without its suffixes."""
    return path.name.partition(".")[0]


def stdlib_documents() -> Iterator[Document]:
    """Python's own standard library with its tests; the generated character tables are left out."""
    return folder_documents(Path(sysconfig.get_path("stdlib")), frozenset({"site-packages", "dist-packages", "encodings", "__pycache__"}))


def site_packages_documents() -> Iterator[Document]:
    """Sources of the packages installed beside this one."""
    return (d for d in folder_documents(Path(sysconfig.get_path("purelib")), frozenset({"__pycache__"})) if d.kind == "code")


def jsonl_documents(path: Path, field: str) -> Iterator[Document]:
    """One document per line, its text in ``field``; empty lines and empty texts are passed over.

    Raises:
        ValueError: a line that is no JSON object, lacks the field, or is no valid Unicode; it names file and line.
    """
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
                if not isinstance(text, str):
                    raise TypeError(f"that is {type(text).__name__}")
                text.encode()  # JSON can escape half of a surrogate pair
            except (ValueError, KeyError, TypeError) as error:
                reason = str(error).partition(":")[0] if isinstance(error, json.JSONDecodeError) else f"{type(error).__name__}: {error}"
                raise ValueError(f"{path}:{number}: not a JSON object with text in {field!r} ({reason})") from None
            if text.strip():
                yield Document("prose", text)


def debian_documents(package: str, downloads: Path) -> Iterator[Document]:
    """Documentation of a Debian package: downloaded (not installed) once into ``downloads``, unpacked to a temporary folder.

    Raises:
        Unavailable: no apt here, or it cannot give the package.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise Unavailable("no apt-get on this machine")
    if not list(downloads.glob(f"{package}_*.deb")):
        _download(package, downloads)
    with tempfile.TemporaryDirectory() as unpacked:
        done = _run(["dpkg-deb", "-x", str(max(downloads.glob(f"{package}_*.deb"))), unpacked])
        if done.returncode:
            raise Unavailable(_last_line(done.stderr))
        yield from folder_documents(Path(unpacked) / "usr" / "share")


def _download(package: str, downloads: Path) -> None:
    downloads.mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "download", "-qq", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", package]
    with tempfile.TemporaryDirectory(dir=downloads) as arriving:  # a download cut short is never taken for a package
        done = _run(command, arriving)
        if done.returncode and _update_lists():
            done = _run(command, arriving)
        if done.returncode:
            raise Unavailable(_last_line(done.stderr))
        for package_file in Path(arriving).glob("*.deb"):
            os.replace(package_file, downloads / package_file.name)


@functools.cache
def _update_lists() -> bool:
    """A fresh machine has no package lists yet, and only root may fetch them. Tried once; whether there are new lists."""
    return os.geteuid() == 0 and _run(["apt-get", "update", "-qq"]).returncode == 0


def _run(command: list[str], folder: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["failed"])[-1]
