"""`python -m transkimmer_kernels.tune`: measures configurations on this GPU and writes them to its file."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import triton_support, tuning
from ..files import write_whole
from .compiling import compile_candidates
from .problems import PROBLEMS, ROWS, tunables
from .search import search

_DTYPES = {name: dtype for dtype, name in triton_support.DTYPE_NAMES.items()}


def why_not() -> str | None:
    """None where something can be measured."""
    if (reason := triton_support.why_not_importable()) is not None:
        return reason
    if triton_support.interpreted():
        return "TRITON_INTERPRET=1 is set: the interpreter's times say nothing; unset it"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m transkimmer_kernels.tune", description=(__doc__ or "").strip())
    parser.add_argument("--operators", nargs="+", choices=sorted(PROBLEMS), default=sorted(PROBLEMS))
    parser.add_argument("--dtypes", nargs="+", choices=sorted(_DTYPES), default=["bf16"])
    parser.add_argument("--sizes", nargs="+", type=int, help="only shape classes made of these widths and multiples")
    parser.add_argument("--minutes", type=float, default=30.0, help="then write what there is")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--out", type=Path, default=tuning.PACKAGED, help="folder of the file; entries in it are kept")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: must be at least 1")
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g}: must be above 0")
    known = {min(sizes) for name in options.operators for sizes in PROBLEMS[name].sizes}
    if unknown := sorted(set(options.sizes or ()) - known):
        text = " ".join(map(str, unknown))
        parser.error(f"--sizes {text}: must be among {', '.join(map(str, sorted(known)))} for these operators")
    if (reason := why_not()) is not None:
        print(f"tune: {reason}; nothing was measured and nothing was written", file=sys.stderr)
        return 1
    path = options.out / tuning.file_names(torch.device("cuda"))[0]
    document = start(path)
    deadline = time.monotonic() + 60 * options.minutes
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for operator, dtype, sizes in _classes(options):
            name = tuning.shape_class(dtype, *sizes)
            if time.monotonic() > deadline:
                print(f"{operator} {name}: no time was left")
                continue
            tunable, device = tunables()[operator], torch.device("cuda")
            compile_candidates(pool, tunable, dtype, sizes, deadline)
            calls = [PROBLEMS[operator].make(dtype, sizes, rows, device) for rows in ROWS]
            found = search(tunable, dtype, sizes, calls, seconds, deadline=deadline)
            document["operators"].setdefault(operator, {})[name] = found.entry()
            write_whole(path, json.dumps(document, indent=1) + "\n")
            print(
                f"{operator} {name}: {found.config}, {found.times} us; default {found.default_times} us; "
                f"{found.tried} tried, {len(found.dropped)} dropped",
                flush=True,
            )
    print(f"wrote {path}")
    return 0


def _classes(options: Any) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    for operator in filter(tunables().__contains__, options.operators):
        for dtype in options.dtypes:
            for sizes in PROBLEMS[operator].sizes:
                if options.sizes is None or min(sizes) in options.sizes:
                    yield operator, _DTYPES[dtype], sizes


def start(path: Path) -> dict[str, Any]:
    """The document to go on with: what the file holds, or a new one, for this device and these versions."""
    document: dict[str, Any] = {"format": tuning.FORMAT, "operators": {}}
    if path.is_file():
        held = json.loads(path.read_text(encoding="utf-8"))
        if held.get("format") == tuning.FORMAT:
            document = held
    properties = torch.cuda.get_device_properties(0)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    return document | {
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "rows": [list(rows) for rows in ROWS],
    }


def seconds(run: Callable[[], Tensor]) -> float:
    """Median time of a call on the device: of replays of a graph, because launching most of these takes longer."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(run, rep=2, return_mode="median") / 1e3


if __name__ == "__main__":
    sys.exit(main())
