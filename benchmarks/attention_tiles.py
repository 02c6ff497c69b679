"""How full the tiles of `ragged_attention` are: scores that count over scores computed, layer by layer.

    python -m benchmarks.attention_tiles [--check]

Counted, not timed: no device is needed. Real lengths, the keep ratios of the schedules, and the tiles that the Triton
kernel ships in bf16 at head_dim 64, cut in either way. Writes results/attention-tiles.json and the table in
docs/kernels.md; `--check` fails where either would change.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transkimmer.bench.workload import SCHEDULES, known_lengths

from transkimmer_kernels.ops.ragged_attention.tiling import default

from .markdown import between, head, line
from .single_runs import write

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/results/attention-tiles.json", ROOT / "docs/kernels.md"
TASKS, LAYERS, SEQUENCES, LONGEST = ("sst2", "mrpc", "rte", "imdb"), (0, 4, 8, 11), 128, 512


def aligned_scores(lengths: Sequence[int], rows: int, keys: int) -> int:
    """Scores computed where a tile of `rows` queries lies in one sequence and walks its keys in blocks of `keys`."""
    return sum(math.ceil(n / rows) * rows * math.ceil(n / keys) * keys for n in lengths)


def packed_scores(lengths: Sequence[int], rows: int, keys: int) -> int:
    """The same where a tile takes the next `rows` queries and walks the keys of all sequences they are from."""
    offsets = [0, *itertools.accumulate(lengths)]
    scores = 0
    for first in range(0, offsets[-1], rows):
        last = min(first + rows, offsets[-1]) - 1
        begin = offsets[bisect.bisect_right(offsets, first) - 1]
        end = offsets[bisect.bisect_right(offsets, last)]
        scores += rows * math.ceil((end - begin) / keys) * keys
    return scores


def measure() -> list[dict[str, Any]]:
    tiling = default(torch.bfloat16, 64)
    rows: list[dict[str, Any]] = []
    for task, layer in itertools.product(TASKS, LAYERS):
        ratio = SCHEDULES[task] ** (layer + 1)
        lengths = [max(1, round(min(n, LONGEST) * ratio)) for n in known_lengths()[task][:SEQUENCES]]
        useful = sum(n * n for n in lengths)
        rows.append(
            {
                "name": f"{task}, layer {layer}",
                "mean_length": round(sum(lengths) / len(lengths), 1),
                "aligned": round(useful / aligned_scores(lengths, *tiling.aligned), 3),
                "packed": round(useful / packed_scores(lengths, *tiling.packed), 3),
            }
        )
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = head(("lengths", "mean", "aligned tiles", "packed tiles"))
    for row in rows:
        lines.append(line([row["name"], str(row["mean_length"]), f"{row['aligned']:.1%}", f"{row['packed']:.1%}"]))
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    rows = measure()
    text = PAGE.read_text(encoding="utf-8")
    rendered = between(text, "tiles", markdown(rows))
    if arguments.check:
        stored = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
        return int(rows != stored or rendered != text)
    write(RESULT, "Fill of attention tiles, counted", rows)
    PAGE.write_text(rendered, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
