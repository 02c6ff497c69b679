"""Markdown of generated pages: tables, and parts of a page between markers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

NOTHING = "–"  # in a cell that has no figure


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head(cells: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(cells), line(["---"] * len(cells))]


def between(text: str, name: str, content: str) -> str:
    """`text` with `content`, which ends with a line feed, between the markers of `name`.

    Raises:
        ValueError: `text` has not each marker once.
    """
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{content}{end}{after}"
