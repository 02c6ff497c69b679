"""How far processes differ: the four products of BERT-base on cold weights, timed in a number of fresh processes.

    python -m benchmarks.processes [--dtype bf16] [--processes 16] [--library FILE] [--json FILE]

A process's code and memory lie where they like, and a kernel may be fast in one and slow in the next, each time it is
run there. `--library` names another build of the CPU library, whose processes take turns with the packaged one's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transkimmer.bench.workload import DTYPES

from transkimmer_kernels import kernel_set
from transkimmer_kernels.cpu_products import pack_weight

from .packing import COLD_SETS, SHAPES
from .single_runs import write

ROWS = (6, 12, 24, 36, 54)
ROUNDS = 8


def seconds(dtype: str) -> dict[int, float]:
    """Row count -> the median time of the four products, here."""
    kernels, found = kernel_set("cpu", "cpu", DTYPES[dtype]), {}
    matrices = [[torch.randn(shape).to(DTYPES[dtype]) for shape in SHAPES] for _ in range(COLD_SETS)]
    sets = [[pack_weight(matrix, "panels") for matrix in turn] for turn in matrices]
    with torch.inference_mode():
        for rows in ROWS:
            x = {width: torch.randn(rows, width).to(DTYPES[dtype]) for _, width in SHAPES}
            cu_seqlens, times = torch.tensor([0, rows], dtype=torch.int32), []
            for weights in sets * ROUNDS:
                start = time.perf_counter()
                for (_, width), weight in zip(SHAPES, weights, strict=True):
                    kernels.ragged_linear(x[width], weight, None, cu_seqlens, None, "none")
                times.append(time.perf_counter() - start)
            found[rows] = statistics.median(times[COLD_SETS:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--library", help="another build of libtranskimmer_cpu.so, timed beside the packaged one")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(seconds(arguments.dtype)))
        return
    libraries = {"packaged": os.environ} | (
        {"other": os.environ | {"TRANSKIMMER_LIBRARY": arguments.library}} if arguments.library else {}
    )
    command = [sys.executable, "-m", "benchmarks.processes", "--here", "--dtype", arguments.dtype]
    runs: dict[str, list[dict[str, float]]] = {library: [] for library in libraries}
    for _ in range(arguments.processes):
        for library, surroundings in libraries.items():
            run = subprocess.run(command, env=surroundings, check=True, capture_output=True, text=True)
            runs[library].append(json.loads(run.stdout))
    results = []
    for library, (rows, name) in itertools.product(libraries, ((rows, str(rows)) for rows in ROWS)):
        times = sorted(run[name] for run in runs[library])
        row = {"rows": rows, "dtype": arguments.dtype, "library": library, "median_s": statistics.median(times)}
        results.append(row | {"least": times[0], "most": times[-1]})
        print(f"{library}, {rows} rows: {1e3 * times[0]:.3f}, {1e3 * row['median_s']:.3f}, {1e3 * times[-1]:.3f} ms")
    write(arguments.json, "Products in fresh processes", results)


if __name__ == "__main__":
    main()
