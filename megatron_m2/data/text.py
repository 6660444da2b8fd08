"""Files to clean text: HTML, man pages, POD and compressed files lose their markup, source code and plain text stay as they are."""

from __future__ import annotations

import gzip
import re
import zlib
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

CODE_SUFFIXES = frozenset([
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cu", ".cuh", ".hpp", ".rs", ".go", ".java", ".js", ".ts", ".el", ".sh", ".pl", ".rb",
    ".lua", ".sql", ".hs", ".ml", ".scala", ".kt", ".swift",
])
PROSE_SUFFIXES = frozenset([".txt", ".md", ".rst", ".html", ".htm", ".pod", ".tex", ".org"])
_MAN_PAGE = re.compile(r"\.[1-8][a-z]*$")
_MAX_CODE = 1_000_000  # bytes; larger sources are tables and generated code

_BLOCK_TAGS = frozenset([
    "p", "div", "tr", "li", "dt", "dd", "br", "hr", "table", "ul", "ol", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "section",
    "blockquote",
])
_SKIPPED_TAGS = frozenset(["script", "style", "head", "nav", "footer"])


class _HtmlText(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping, self.preformatted = 0, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipping += tag in _SKIPPED_TAGS
        self.preformatted += tag == "pre"
        if tag in _BLOCK_TAGS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping = max(0, self.skipping - (tag in _SKIPPED_TAGS))
        self.preformatted = max(0, self.preformatted - (tag == "pre"))
        if tag in _BLOCK_TAGS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))


def html_to_text(html: str) -> str:
    """What a reader sees: no scripts, heads or navigation; one line per block, preformatted text as it is."""
    parser = _HtmlText()
    parser.feed(html)
    parser.close()
    return _tidy("".join(parser.parts))


_LESS, _GREATER = "\1", "\2"  # literal brackets while POD's codes are taken off


def pod_to_text(pod: str) -> str:
    """Perl's documentation out of a .pod or module: headings and paragraphs without ``=`` commands and ``B<...>`` codes."""
    lines, inside = [], False
    for line in pod.splitlines():
        if re.match(r"=[a-zA-Z]", line):
            inside = not line.startswith("=cut")
            heading = re.sub(r"^=\S+\s*", "", line) if line.startswith(("=head", "=item")) else ""
            lines.append(heading)
        elif inside:
            lines.append(line)
    text = "\n".join(lines).replace("E<lt>", _LESS).replace("E<gt>", _GREATER)
    # long brackets may hold single ones: C<< a->b >>
    text = re.sub(r"[A-Z]<<+\s+(.*?)\s+>>+", lambda m: m[1].replace("<", _LESS).replace(">", _GREATER), text, flags=re.DOTALL)
    for _ in range(3):  # codes nest
        text = re.sub(r"([A-Z])<([^<>]*)>", lambda m: "" if m[1] in "XZ" else m[2].partition("|")[0] if m[1] == "L" else m[2], text)
    return _tidy(text.replace(_LESS, "<").replace(_GREATER, ">"))


def man_to_text(roff: str) -> str:
    """A man page without requests, fonts and escapes."""
    lines = []
    for line in roff.splitlines():
        if line.startswith(('.\\"', "'\\\"")):
            continue
        request = re.match(r"[.'](\w+)\s*(.*)", line)
        if request:
            line = request[2].replace('"', "") if request[1] in ("SH", "SS", "B", "I", "BR", "IR", "RB", "RI", "BI", "TP", "IP") else ""
        lines.append(line)
    text = re.sub(r"\\f(\(..|\[[^]]*\]|.)", "", "\n".join(lines))
    text = text.replace("\\-", "-").replace("\\&", "").replace("\\(aq", "'").replace("\\e", "\\")
    return _tidy(text)


def _tidy(text: str) -> str:
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def is_html(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith((".html", ".htm"))


def is_man_page(path: Path) -> bool:
    return bool(_MAN_PAGE.search(path.name.removesuffix(".gz"))) and path.parent.name.startswith("man")


def kind_of(path: Path) -> str | None:
    """"code" or "prose" by the file's name; None when it is of no known kind."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix in CODE_SUFFIXES:
        return "code"
    return "prose" if suffix in PROSE_SUFFIXES or is_man_page(path) else None


def read_text(path: Path) -> tuple[str, str] | None:
    """(kind, clean text) of a file; None when it is of no known kind, binary, damaged, empty, or generated (code above 1 MB)."""
    kind = kind_of(path)
    if kind is None or not path.is_file():
        return None
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error):
        return None
    if "\0" in text or (kind == "code" and len(raw) > _MAX_CODE):
        return None
    if is_html(path):
        text = html_to_text(text)
    elif path.name.removesuffix(".gz").endswith(".pod"):
        text = pod_to_text(text)
    elif is_man_page(path):
        text = man_to_text(text)
    return (kind, text) if text.strip() else None


def drop_boilerplate(texts: list[str], share: float = 0.2) -> list[str]:
    """Removes lines that stand in more than a share (and more than ten) of the texts: page headers, footers, menus."""
    seen: Counter[str] = Counter()
    for text in texts:
        seen.update({line.strip() for line in text.splitlines()} - {""})
    common = {line for line, count in seen.items() if count > max(10, share * len(texts)) and len(line) > 3}
    return [_tidy("\n".join(line for line in text.splitlines() if line.strip() not in common)) for text in texts] if common else texts
