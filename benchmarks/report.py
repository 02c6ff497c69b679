"""Renders the stored results into the README, between its markers; `--check` fails where the two differ.

python benchmarks/report.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/cpu"
README = ROOT / "README.md"
START, END = "<!-- results: start -->", "<!-- results: end -->"
PADDED, PLAIN, OURS, SKIMMING = range(4)  # order of a result's rows


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table() -> str:
    """The README's tables as Markdown."""
    lines = [
        "| lengths, schedule | dtype | FLOPs × | wall-clock × | **skim efficiency** | spread | × padded HF "
        "| our dense × plain PyTorch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = [f"{task}-{dtype}" for task in ("mrpc", "sst2", "rte", "imdb") for dtype in ("fp32", "bf16")]
    results = {name: load(name) for name in names}
    for name, result in results.items():
        task, dtype = name.split("-")
        rows = result["rows"]
        skimming = rows[SKIMMING]
        lines.append(
            f"| {task} | {dtype} | {skimming['flops_speedup']:.2f} | {skimming['wall_clock_speedup']:.2f} "
            f"| **{skimming['skim_efficiency']:.2f}** | {skimming['spread']:.0%} "
            f"| {rows[PADDED]['median_s'] / skimming['median_s']:.2f} "
            f"| {rows[PLAIN]['median_s'] / rows[OURS]['median_s']:.2f} |"
        )
    environment = results[names[0]]["environment"]
    lines += [
        "",
        f"BERT-base shape, batch 16, {environment['processor']}, {environment['threads']} threads, "
        f"torch {environment['torch']}; `python benchmarks/schedules.py`.",
        "",
        *demo_lines(),
    ]
    return "\n".join(lines)


def demo_lines() -> list[str]:
    lines = [
        "| demo model (MiniLM, SST-2 dev, learned decisions) | dtype | accuracy | FLOPs × | wall-clock × "
        "| **skim efficiency** | same answers |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype in ("fp32", "bf16"):
        row = load(f"demo-{dtype}")["rows"][SKIMMING]
        lines.append(
            f"| skimming, batch 32 | {dtype} | {row['accuracy']:.2%} | {row['flops_speedup']:.2f} "
            f"| {row['wall_clock_speedup']:.2f} | **{row['skim_efficiency']:.2f}** | {row['agreement']:.1%} |"
        )
    figures = json.loads((ROOT / "python/transkimmer/demo/figures.json").read_text(encoding="utf-8"))
    return [*lines, "", f"Its own dense fine-tune: {figures['dense_accuracy']:.2%} (`transkimmer train-demo`)."]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    _, after = rest.split(END)
    rendered = f"{before}{START}\n{table()}\n{END}{after}"
    if arguments.check:
        if rendered != text:
            print("README.md: its results are not the stored ones; run: python benchmarks/report.py", file=sys.stderr)
        return int(rendered != text)
    README.write_text(rendered, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
