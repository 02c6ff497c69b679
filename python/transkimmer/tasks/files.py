"""Opening a task's files."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any


def open_text(path: Path) -> Any:
    """Opens a UTF-8 text file, unpacking `.xz`; a byte order mark is skipped."""
    unpack: Callable[..., Any] = lzma.open if path.suffix == ".xz" else open
    return unpack(path, "rt", encoding="utf-8-sig", newline="")
