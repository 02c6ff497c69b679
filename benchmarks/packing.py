"""Rate of BERT-base's four matrix products against the row count, by the form of the weights.

    python -m benchmarks.packing [--dtype bf16] [--cold] [--json FILE]

What `transkimmer_kernels/cpu_products.py` was decided by: our panels, oneDNN's layout for several row counts, and
F.linear. Contenders take turns; GFLOP/s from the median of the repeats. `--cold`: every call takes the weights of
another layer, as in a model, so that they come from memory and not from a cache.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transkimmer.bench.workload import DTYPES

from transkimmer_kernels import kernel_set
from transkimmer_kernels.cpu_products import pack_weight
from transkimmer_kernels.onednn import can_pack

from .single_runs import median_seconds, write

SHAPES = ((2304, 768), (768, 768), (3072, 768), (768, 3072))  # [out, in]
ROWS = (16, 56, 128, 336, 880)
HINTS = (16, 256, 880)  # row counts the packed layout is chosen for
COLD_SETS = 6  # of weights, 27 MiB each in fp32


def products(rows: int, dtype: torch.dtype, sets: int) -> dict[str, Callable[[], None]]:
    """name -> the four products on `rows` rows, at every call with the next of `sets` sets of weights."""
    ops = torch.ops.mkldnn
    x = {width: torch.randn(rows, width, dtype=dtype) for _, width in SHAPES}
    plain = [[torch.randn(shape, dtype=dtype) for shape in SHAPES] for _ in range(sets)]
    biases = [torch.randn(out, dtype=dtype) for out, _ in SHAPES]
    cu_seqlens = torch.tensor([0, rows], dtype=torch.int32)
    native = kernel_set("cpu", "cpu", dtype)

    def field(
        pack: Callable[[Tensor], Tensor], multiply: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Callable[[], None]:
        turns = itertools.cycle([[pack(weight) for weight in weights] for weights in plain])

        def run() -> None:
            for (_, width), weight, bias in zip(SHAPES, next(turns), biases, strict=True):
                multiply(x[width], weight, bias)

        return run

    def panels(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return native.ragged_linear(x, weight, bias, cu_seqlens, None, "none")

    def onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops._linear_pointwise(x, weight, bias, "none", [], "")

    found = {"panels": field(lambda weight: pack_weight(weight, "panels"), panels)}
    for hint in HINTS if can_pack(dtype) else ():
        found[f"packed for {hint} rows"] = field(functools.partial(ops._reorder_linear_weight, batch_size=hint), onednn)
    return found | {"F.linear": field(lambda weight: weight, F.linear)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cold", action="store_true", help="weights from memory, not from a cache")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for rows in ROWS:
        field = products(rows, DTYPES[arguments.dtype], COLD_SETS if arguments.cold else 1)
        seconds = median_seconds(field, arguments.repeats, warm_up=2)
        flops = 2e-9 * rows * sum(out * width for out, width in SHAPES)
        rates = {name: round(flops / median, 1) for name, median in seconds.items()}
        name = f"{rows} rows, cold weights" if arguments.cold else f"{rows} rows"
        results.append({"name": name, "dtype": arguments.dtype, "gflops_per_s": rates})
        print(results[-1])
    write(arguments.json, "Matrix products by row count", results)


if __name__ == "__main__":
    main()
