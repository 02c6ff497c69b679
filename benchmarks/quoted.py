"""Figures quoted in the text of README and docs: each says behind it, in a comment, which stored value it is.

    0.79<!-- = cpu-avx2/sst2-batch1-fp32.json rows.3.skim_efficiency .2f -->

File below `benchmarks/results`, path into its JSON, and Python's format of the number.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_QUOTE = re.compile(r"[0-9][0-9.,]*%?(?P<tag><!-- = (?P<file>\S+) (?P<path>\S+) (?P<format>\S+) -->)")


def refresh(text: str, results: Path) -> str:
    """`text` with every tagged figure as it is stored.

    Raises:
        ValueError: a tag names a file or a value that is not there.
    """

    def stored(match: re.Match[str]) -> str:
        value = lookup(results / match["file"], match["path"])
        return format(value, match["format"]) + match["tag"]

    return _QUOTE.sub(stored, text)


def lookup(file: Path, path: str) -> Any:
    """The value at a dotted path; list entries by their number."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        for key in path.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
    except (OSError, KeyError, IndexError, ValueError, TypeError) as error:
        raise ValueError(f"a quoted figure: {file} has no {path}") from error
    return value
