"""Figures in running text: each that names its source, in an HTML comment behind it, is the stored one, rounded.

Sources are results of ours, or benchmarks/paper.json, where the paper's figures are quoted.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# README has figures in generated tables only.
DOCUMENTS = ("docs/benchmarks.md", "docs/design.md", "docs/gpu.md", "docs/paper.md", "docs/training.md")
FIGURE = re.compile(
    r"(?P<figure>\d[\d,]*(?:\.\d+)?)(?P<unit> %| points)?<!-- (?P<file>\S+\.json): (?P<keys>[^>]+?) -->"
)
# What running text measures: decimals, and numbers with a unit.
MEASURED = re.compile(r"\d[\d,]*\.\d+|\d[\d,]*(?= ?(?:ms|µs|us|%|×|times|[GM]i?B)(?!\w))")
# Code, comments, and whole lines: tables, headings, commands.
NOT_TEXT = re.compile(r"`[^`]*`|<!--[\s\S]*?-->|^(?:\||#|    ).*$", re.MULTILINE)
# In docs/gpu.md: versions, aims and sizes, which are not measured.
CHOSEN = (
    "torch 2.11",
    "Triton 3.6",
    "aim was 0.8",
    "efficiency of 0.70",
    "of 0.90 from",
    "below 0.70",
    "below 0.90",
    "128 × 128",
)


def stored(file: Path, keys: str, percent: bool) -> float:
    """keys: "rows/3/spread", or two of these with "over" (in percent: its distance from 1) or "minus" between."""

    def value(path: str) -> float:
        found = json.loads(file.read_text(encoding="utf-8"))
        for key in path.strip().split("/"):
            found = found[int(key)] if isinstance(found, list) else found[key]
        return float(found)

    if " over " in keys:
        numerator, denominator = map(value, keys.split(" over "))
        number = numerator / denominator
        number = abs(number - 1) if percent else number
    elif " minus " in keys:
        minuend, subtrahend = map(value, keys.split(" minus "))
        number = minuend - subtrahend
    else:
        number = value(keys)
    return 100 * number if percent else number


def wrong(text: str, root: Path) -> list[str]:
    """Figures with a source that are not what the source says, rounded to the figure's own digits."""
    found = []
    for match in FIGURE.finditer(text):
        figure = match["figure"].replace(",", "")
        digits = len(figure.partition(".")[2])
        number = stored(root / match["file"], match["keys"], bool(match["unit"]))
        if abs(float(figure) - number) > 0.5 * 10**-digits + 1e-9:
            found.append(f"{match['figure']}{match['unit'] or ''}: {match['file']}, {match['keys']} is {number:.6g}")
    return found


def loose(text: str, chosen: tuple[str, ...] = ()) -> list[str]:
    """Measured numbers of running text without a source; `chosen`: phrases whose numbers need none."""
    text = NOT_TEXT.sub("", FIGURE.sub("", text))
    for phrase in chosen:
        assert phrase in text, f"not in the text any more: {phrase}"
        text = text.replace(phrase, "")
    return MEASURED.findall(text)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_figures_are_the_stored_ones(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert wrong(text, ROOT) == []
    # A source that the pattern does not fit would hold nothing.
    assert len(re.findall(r"<!-- \S+\.json", text)) == len(FIGURE.findall(text)) > 0


def test_a_wrong_figure_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"rows": [{"x": 0.514, "F.y": 0.5}]}))
    right = (
        "51 %<!-- a.json: rows/0/x -->, 0.51<!-- a.json: rows/0/x -->, 3 %<!-- a.json: rows/0/x over rows/0/F.y -->, "
    )
    right += "1.4 points<!-- a.json: rows/0/x minus rows/0/F.y --> and 1.03<!-- a.json: rows/0/x over rows/0/F.y -->"
    assert wrong(right, tmp_path) == [] and len(FIGURE.findall(right)) == 5
    assert wrong("0.52<!-- a.json: rows/0/x -->", tmp_path) == ["0.52: a.json, rows/0/x is 0.514"]
    with pytest.raises(KeyError):
        wrong("0.52<!-- a.json: rows/0/z -->", tmp_path)


def test_measured_numbers_of_the_gpu_page_have_sources() -> None:
    assert loose((ROOT / "docs/gpu.md").read_text(encoding="utf-8"), CHOSEN) == []


def test_a_number_without_a_source_is_found() -> None:
    fine = "# 1.5 ms\n\n| 2 ms | 0.3 |\n\n    --minutes 2.5\n\n`x=0.1`, torch 2.11, "
    fine += "4<!-- a.json: x --> ms, 5 %<!-- a.json: y --> of 64 rows <!-- 6 ms -->"
    assert loose(fine, ("torch 2.11",)) == []
    bad = "from 1<!-- a.json: x --> to 2 µs, 1,024 ms, 3 %, 0.5 of it, 4 × this, 16 GiB, 7 usable"
    assert loose(bad) == ["2", "1,024", "3", "0.5", "4", "16"]
    with pytest.raises(AssertionError, match="any more: torch"):
        loose("", ("torch 2.11",))
