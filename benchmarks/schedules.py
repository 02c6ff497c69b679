"""Measures the README's table: BERT-base shape, real lengths, synthetic schedules, fp32 and bf16, and the demo model.

    python benchmarks/schedules.py [--only mrpc-fp32 ...]

Each row is one run of `transkimmer bench`, stored as `benchmarks/results/DEVICE/NAME.json`; `report.py` renders them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transkimmer.bench.results import device_name
from transkimmer.cli import main as transkimmer

RESULTS = Path(__file__).parent / "results"
# name -> arguments of `transkimmer bench`; long texts are timed in fewer batches
RUNS = {
    f"{task}-{dtype}": [
        *("--model", "bert-base-shape", "--schedule", task, "--lengths", task),
        *("--batches", batches, "--dtype", dtype, "--batch-size", "16"),
    ]
    for task, batches in (("mrpc", "4"), ("sst2", "4"), ("rte", "4"), ("imdb", "1"))
    for dtype in ("fp32", "bf16")
} | {f"demo-{dtype}": ["--dtype", dtype] for dtype in ("fp32", "bf16")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--repeats", default="7")
    arguments = parser.parse_args()
    folder = RESULTS / device_name("cpu")
    folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        target = str(folder / f"{name}.json")
        status = transkimmer(["bench", *RUNS[name], "--repeats", arguments.repeats, "--json", target])
        if status:
            raise SystemExit(status)


if __name__ == "__main__":
    main()
