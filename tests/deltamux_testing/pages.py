"""The documentation's pages, and what they contain: blocks of code, links, anchors, spans of code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "plugins").rglob("*.md")])

NOT_RUN = re.compile(r"<!-- not run: .+ -->\s*$")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        runs: whether no comment before it says why it does not.
    """

    page: Path
    language: str
    text: str
    line: int
    runs: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> Iterator[Block]:
    """Yields the fenced blocks of a language, in their order."""
    for found in _FENCE.finditer(text(page)):
        if found[1] == language:
            before = text(page)[: found.start()]
            yield Block(page, language, found[2], before.count("\n") + 1, NOT_RUN.search(before) is None)


@cache
def prose(page: Path) -> str:
    """Returns a page without its fenced blocks."""
    return _FENCE.sub("", text(page))


def links(page: Path) -> list[str]:
    """Returns the targets of all links and images, but for those of code."""
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page)))


def spans(page: Path) -> list[str]:
    """Returns all spans of code."""
    return re.findall(r"`([^`\n]+)`", prose(page))


@cache
def anchors(page: Path) -> frozenset[str]:
    """Returns the anchors of a page's headings."""
    return frozenset(_slug(heading) for heading in _HEADING.findall(prose(page)))


def _slug(heading: str) -> str:
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain).strip())


def table(page: Path, first: str) -> list[list[str]]:
    """Returns the rows of the table whose first column's head is `first`, cell by cell."""
    lines = text(page).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows: list[list[str]] = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip().strip("|").split(" | ")])
    return rows
