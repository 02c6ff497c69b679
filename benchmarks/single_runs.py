"""What scripts have in common that time functions against each other, or count, and write one file of rows."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transkimmer.bench.environment import environment

from transkimmer_kernels.files import write_whole


def median_seconds(
    field: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int, between: Callable[[], Any] | None = None
) -> dict[str, float]:
    """name -> the median time of a call. Contenders take turns.

    Args:
        warm_up: rounds before the first that counts, which compile. between: called before each call, not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in field}
    for repeat in range(warm_up + repeats):
        for name, run in field.items():
            if between is not None:
                between()
            start = time.perf_counter()
            run()
            if repeat >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def write(path: Path | None, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """With the environment; nothing where there is no path."""
    if path is not None:
        document = {"title": title, "environment": environment(), "rows": rows}
        write_whole(path, json.dumps(document, indent=2) + "\n")
