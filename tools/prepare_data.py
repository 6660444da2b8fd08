#!/usr/bin/env python3
"""Turns text into a folder to train on: Megatron's indexed files, a tokenizer, held-out documents.

    python tools/prepare_data.py --out data/mine --source folder:notes --source jsonl:web.jsonl --source deb:perl-doc --source stdlib

Sources: `folder:PATH` (text, code, HTML, man pages, POD, gzipped or not), `jsonl:FILE`, `deb:PACKAGE` (a Debian documentation package,
downloaded and unpacked, not installed), `stdlib` (Python's own library) and `site-packages`. Code goes to the dataset `code`, all
else to `prose`. Without a source: the quickstart's corpus. A second run with the same arguments returns at once.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_m2.data import corpus
from megatron_m2.data.corpus import Document
from megatron_m2.data.prepare import PrepareConfig, is_prepared, prepare

# Essays and technical prose, 32 MB clean in 22 MB of packages. Pages made from templates (cppreference, say) are not among them: half
# of each stands in its siblings too, so that held-out pages would be half known.
DEFAULT_PACKAGES = ("python3.11-doc", "anarchism", "vim-doc")
DEFAULT_LEAST_BYTES = 30_000_000


def default_documents(downloads: Path) -> Iterator[Document]:
    """The standard library and documentation packages; where those cannot be had, the sources of installed packages fill up."""
    size = 0
    packages = (optional_package(package, downloads) for package in DEFAULT_PACKAGES)
    for document in itertools.chain(corpus.stdlib_documents(), *packages):
        size += len(document.text.encode())
        yield document
    if size >= DEFAULT_LEAST_BYTES:
        return
    print(f"only {size / 1e6:.1f} MB so far: adding the sources of installed packages", file=sys.stderr)
    for document in corpus.site_packages_documents():
        if size >= DEFAULT_LEAST_BYTES:
            return
        size += len(document.text.encode())
        yield document


def optional_package(package: str, downloads: Path) -> Iterator[Document]:
    """A package's documents, or none and a line that says why."""
    try:
        yield from corpus.debian_documents(package, downloads)
    except corpus.Unavailable as reason:
        print(f"without {package}: {reason}", file=sys.stderr)


def source_documents(source: str, downloads: Path, jsonl_field: str) -> Iterator[Document]:
    """Documents of one ``--source``.

    Raises:
        ValueError: an unknown kind, a missing path, a package that cannot be had, a bad line.
    """
    kind, _, where = source.partition(":")
    if source == "stdlib":
        yield from corpus.stdlib_documents()
    elif source == "site-packages":
        yield from corpus.site_packages_documents()
    elif kind == "deb" and where:
        try:
            yield from corpus.debian_documents(where, downloads)
        except corpus.Unavailable as reason:
            raise ValueError(f"--source {source}: {reason}") from None
    elif kind in ("folder", "jsonl") and where:
        path = Path(where).expanduser()
        if not (path.is_dir() if kind == "folder" else path.is_file()):
            raise ValueError(f"--source {source}: no such {'folder' if kind == 'folder' else 'file'}")
        found = 0
        for document in corpus.folder_documents(path) if kind == "folder" else corpus.jsonl_documents(path, jsonl_field):
            found += 1
            yield document
        if not found:
            raise ValueError(f"--source {source}: no text in it (empty, or binary files only)")
    else:
        raise ValueError(f"--source {source}: must be stdlib, site-packages, deb:PACKAGE, folder:PATH or jsonl:FILE")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--source", action="append", default=[], help="may be given several times; see above")
    parser.add_argument("--tokenizer", default="bpe", help="bpe (trained on these sources), o200k, or a folder with a tokenizer.json")
    parser.add_argument("--vocab-size", type=int, default=PrepareConfig.vocab_size, help="of a trained tokenizer")
    parser.add_argument("--held-out", type=float, default=PrepareConfig.held_out, help="share of each dataset's bytes kept for evaluation")
    parser.add_argument("--held-out-bytes", type=int, default=PrepareConfig.held_out_bytes, help="and at most so many per dataset")
    parser.add_argument("--jsonl-field", default=PrepareConfig.jsonl_field, help="field of the text in JSONL")
    parser.add_argument("--downloads", type=Path, help="where packages are kept; default: `downloads` beside --out")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0 done, 2 something in the arguments or sources is wrong."""
    a = parse(arguments)
    downloads: Path = (a.downloads or a.out.parent / "downloads").absolute()
    try:
        config = PrepareConfig(tuple(a.source) or ("default",), a.tokenizer, a.vocab_size, a.held_out, a.held_out_bytes, a.jsonl_field)
        if is_prepared(a.out, config):
            print(f"{a.out} is prepared already, with the same arguments; delete it to make it anew")
            return 0
        given = (d for s in a.source for d in source_documents(s, downloads, a.jsonl_field))
        manifest = prepare(a.out, given if a.source else default_documents(downloads), config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    datasets = manifest["datasets"]
    assert isinstance(datasets, dict)
    for name, d in datasets.items():
        print(f"{name:8s}{d['train_documents']:7,} documents {d['train_bytes'] / 1e6:7.1f} MB {d['train_tokens'] / 1e6:7.2f} M tokens;"
              f" held out {d['heldout_documents']:5,} documents {d['heldout_bytes'] / 1e6:5.2f} MB")
    print(f"vocabulary of {manifest['vocab_size']:,} ids; written to {a.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
