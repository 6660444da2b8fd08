"""Where text comes from: the standard library, Debian's documentation packages, folders, JSONL. Each source yields whole documents."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_m2.data.text import drop_boilerplate, read_text


@dataclass(frozen=True)
class Document:
    """kind: "code" or "prose", which is the dataset it goes to."""

    kind: str
    text: str


class Unavailable(Exception):
    """A package cannot be had on this machine; the message says why."""


def folder_documents(folder: Path, skip: frozenset[str] = frozenset()) -> list[Document]:
    """Every readable text below a folder, in order of path.

    Where Sphinx put its sources (``_sources``) beside the HTML made of them, the HTML is left out.

    Args:
        skip: names of subfolders to leave out.
    """
    paths = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in skip)
        paths += [Path(root) / f for f in sorted(files)]
    has_sources = any("_sources" in p.parts for p in paths)
    by_kind: dict[str, list[str]] = {"code": [], "prose": [], "html": []}
    for path in paths:
        is_html = path.suffix in (".html", ".htm")
        if path.is_symlink() or (has_sources and is_html):
            continue
        found = read_text(path)
        if found:
            by_kind["html" if is_html else found[0]].append(found[1])
    return ([Document("code", t) for t in by_kind["code"]] + [Document("prose", t) for t in by_kind["prose"]]
            + [Document("prose", t) for t in drop_boilerplate(by_kind["html"])])


def stdlib_documents() -> list[Document]:
    """Python's own standard library with its tests; the generated character tables are left out."""
    return folder_documents(Path(sysconfig.get_path("stdlib")), frozenset({"site-packages", "dist-packages", "encodings", "__pycache__"}))


def site_packages_documents() -> list[Document]:
    """Python sources of the packages installed beside this one."""
    documents = folder_documents(Path(sysconfig.get_path("purelib")), frozenset({"__pycache__"}))
    return [d for d in documents if d.kind == "code"]


def jsonl_documents(path: Path, field: str) -> Iterator[Document]:
    """One document per line, its text in ``field``.

    Raises:
        ValueError: a line that is no JSON object or lacks the field; it names file and line.
    """
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, start=1):
            try:
                text = json.loads(line)[field]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a JSON object with a field {field!r} ({type(error).__name__})") from None
            if not isinstance(text, str):
                raise ValueError(f"{path}:{number}: field {field!r} is {type(text).__name__}, not text")
            if text.strip():
                yield Document("prose", text)


def debian_documents(package: str, downloads: Path) -> list[Document]:
    """Documentation of a Debian package: downloaded (not installed) once into ``downloads``, unpacked to a temporary folder.

    Raises:
        Unavailable: no apt here, or it cannot give the package.
    """
    found = sorted(downloads.glob(f"{package}_*.deb"))
    if not found:
        _download(package, downloads)
        found = sorted(downloads.glob(f"{package}_*.deb"))
    with tempfile.TemporaryDirectory() as unpacked:
        done = subprocess.run(["dpkg-deb", "-x", str(found[-1]), unpacked], capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"dpkg-deb: {_last_line(done.stderr)}")
        return folder_documents(Path(unpacked) / "usr" / "share")


def _download(package: str, downloads: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise Unavailable("no apt-get on this machine")
    downloads.mkdir(parents=True, exist_ok=True)
    # the sandbox user of apt may not write here; being root it says so and goes on, so only the exit status counts
    command = ["apt-get", "download", "-qq", package]
    done = subprocess.run(command, cwd=downloads, capture_output=True, text=True)
    if done.returncode and os.geteuid() == 0:  # a fresh machine has no package lists yet
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True, text=True)
        done = subprocess.run(command, cwd=downloads, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(_last_line(done.stderr))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["failed"])[-1]
