"""Markup to clean text, on small cases."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from megatron_m2.data.text import drop_boilerplate, html_to_text, man_to_text, pod_to_text, read_text


def test_html() -> None:
    page = """<!DOCTYPE html><html><head><title>no</title><style>p { }</style></head><body><nav>menu</nav>
    <h1>A &amp; B</h1><p>one
       <b>bold</b> word</p><script>if (a < b) { x() }</script><pre>  keep
    this</pre><ul><li>first<li>second</ul><!-- gone --><footer>no</footer></body></html>"""
    lines = [line for line in html_to_text(page).splitlines() if line.strip()]
    assert lines == ["A & B", "one bold word", "  keep", "    this", "first", "second"]


def test_pod() -> None:
    pod = ("code();\n\n=head1 NAME\n\nfoo - does B<bar and I<baz>> via C<< a->b >>\n\n=over\n\n=item two\n\n"
           "L<Text|Module/link> X<index>iE<lt>3.\n\n=back\n\n=cut\n\nmore_code();\n")
    assert pod_to_text(pod) == "NAME\n\nfoo - does bar and baz via a->b\n\ntwo\n\nText i<3.\n"


def test_man() -> None:
    roff = '.\\" comment\n.TH LS 1\n.SH "NAME"\nls \\- list \\fIdirectory\\fR contents\n.PP\n.B \\-a\nall; a backslash: \\e\n'
    assert man_to_text(roff) == "NAME\nls - list directory contents\n\n-a\nall; a backslash: \\\n"


def test_boilerplate_lines_of_many_pages() -> None:
    pages = [f"My site | Home\n\npage {i}\n{{\n" for i in range(40)]
    assert drop_boilerplate(pages)[3] == "page 3\n{\n"
    assert drop_boilerplate(pages[:5]) == pages[:5]  # too few to know


@pytest.mark.parametrize(("name", "raw", "want"), [
    ("a.py", b"x = 1\r\n", ("code", "x = 1\n")),
    ("a.md", b"\xef\xbb\xbf# T\n", ("prose", "# T\n")),
    ("a.txt.gz", gzip.compress(b"text\n"), ("prose", "text\n")),
    ("man3/f.3perl.gz", gzip.compress(b".SH NAME\nf\n"), ("prose", "NAME\nf\n")),
    ("other/libc.3", b".SH NAME\n", None),
    ("a.htm", b"<p>hi</p>", ("prose", "hi\n")),
    ("a.pod", b"=head1 X\n\ny\n", ("prose", "X\n\ny\n")),
    ("a.png", b"\x89PNG", None),
    ("a.txt", b"caf\xe9", None),
    ("zeros.txt", b"a\0b", None),
    ("empty.txt", b" \n", None),
    ("cut.txt.gz", gzip.compress(b"text" * 99)[:20], None),
    ("no.txt.gz", b"plain", None),
    ("bad.txt.gz", gzip.compress(b"text\n")[:10] + b"\xff" * 30, None),
    ("table.py", b"x = 1\n" * 200_000, None),
])
def test_files(tmp_path: Path, name: str, raw: bytes, want: tuple[str, str] | None) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(raw)
    assert read_text(path) == want


def test_long_prose_is_kept(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("word " * 400_000)
    found = read_text(tmp_path / "book.txt")
    assert found is not None
    assert len(found[1]) == 2_000_000
