"""Rate of BERT-base's four matrix products against the row count: packed weights (ours), F.linear, and layout hints.

    python benchmarks/packing.py [--dtype bf16] [--json FILE]

What `transkimmer_kernels/onednn.py` was decided by. Contenders take turns; GFLOP/s from the median of the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transkimmer.bench.command import DTYPES, environment, write_whole

SHAPES = ((2304, 768), (768, 768), (3072, 768), (768, 3072))  # [out, in]
ROWS = (16, 56, 128, 336, 880)
HINTS = (16, 256, 880)  # row counts the packed layout is chosen for


def products(rows: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """name -> the four products on `rows` rows."""
    ops = torch.ops.mkldnn
    x = {width: torch.randn(rows, width, dtype=dtype) for _, width in SHAPES}
    plain = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    biases = [torch.randn(out, dtype=dtype) for out, _ in SHAPES]

    def packed(hint: int) -> Callable[[], None]:
        weights = [ops._reorder_linear_weight(weight, hint) for weight in plain]

        def run() -> None:
            for (_, width), weight, bias in zip(SHAPES, weights, biases, strict=True):
                ops._linear_pointwise(x[width], weight, bias, "none", [], "")

        return run

    def unpacked() -> None:
        for (_, width), weight, bias in zip(SHAPES, plain, biases, strict=True):
            F.linear(x[width], weight, bias)

    return {f"packed for {hint} rows": packed(hint) for hint in HINTS} | {"F.linear": unpacked}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for rows in ROWS:
        field = products(rows, DTYPES[arguments.dtype])
        seconds: dict[str, list[float]] = {name: [] for name in field}
        for repeat in range(arguments.repeats + 2):
            for name, run in field.items():
                start = time.perf_counter()
                run()
                if repeat >= 2:  # the first two compile and warm up
                    seconds[name].append(time.perf_counter() - start)
        flops = 2e-9 * rows * sum(out * width for out, width in SHAPES)
        rates = {name: round(flops / statistics.median(times), 1) for name, times in seconds.items()}
        results.append({"name": f"{rows} rows", "dtype": arguments.dtype, "gflops_per_s": rates})
        print(results[-1])
    if arguments.json is not None:
        document = {"title": "Matrix products by row count", "environment": environment(), "rows": results}
        write_whole(arguments.json, json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
