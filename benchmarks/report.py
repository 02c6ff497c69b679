"""Renders the stored results into README and docs, and their plots; `--check` fails where these are not current.

    python -m benchmarks.report [--check]     # or: make report

Two kinds of results: single runs of `transkimmer bench` in files named after them, which have tables of their own here,
and the dated files that `bench model`, `bench training` and `profile` add to with `--results` (`runs.py`,
`model_tables.py`, `plots.py`). Accuracy is a table of its own, `accuracy.csv` (`accuracy/`), and stands beside the
paper's figures (`paper_tables.py`). Checking needs no matplotlib: a plot holds the hash of what it shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transkimmer.bench.contenders import KEEP_ALL, PADDED, PLAIN, SKIMMING

from . import model_tables, paper_tables, plots, runs
from .accuracy import plots as accuracy_plots
from .accuracy import results as accuracy_results
from .accuracy import tables as accuracy_tables
from .markdown import NOTHING, between, head, line

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
# Folders with single runs -> what they are called.
MACHINES = {f: name for f, name in model_tables.INSTRUCTION_SETS.items() if (RESULTS / f / "demo-fp32.json").is_file()}
README = ROOT / "README.md"
TASKS, DTYPES = ("mrpc", "sst2", "rte", "imdb"), ("fp32", "bf16")
COLUMNS = ("dtype", "FLOPs × (paper's count)", "wall-clock ×", "**skim efficiency**")


def load(name: str, folder: str) -> dict[str, Any]:
    return json.loads((RESULTS / folder / f"{name}.json").read_text(encoding="utf-8"))


def by_contender(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["rows"]}


def single_runs() -> str:
    """The end of `docs/results.md`: batch 16, which the dated runs do not have."""
    lines = []
    for folder in MACHINES:
        lines += ["", f"## {folder} at batch 16", "", *schedule_lines(folder)]
    return "\n".join([*lines, ""])


def schedule_lines(folder: str) -> list[str]:
    results = {name: load(name, folder) for name in (f"{task}-{dtype}" for task in TASKS for dtype in DTYPES)}
    heads = ("lengths, schedule", *COLUMNS, "spread", "× padded HF", "our dense × plain PyTorch")
    lines = head(heads)
    for name, result in results.items():
        task, dtype = name.split("-")
        rows = by_contender(result)
        skimming, padded = rows[SKIMMING], rows[PADDED]
        over_padded = padded["median_s"] / skimming["median_s"]
        dense = rows[PLAIN]["median_s"] / rows[KEEP_ALL]["median_s"]
        spread = NOTHING if skimming["spread"] is None else f"{skimming['spread']:.0%}"
        lines.append(line([task, dtype, *_speedups(skimming), spread, f"{over_padded:.2f}", f"{dense:.2f}"]))
    environment = next(iter(results.values()))["environment"]
    return [
        *lines,
        "",
        f"BERT-base shape, batch 16, {environment['processor']} ({MACHINES[folder]}), {environment['threads']} "
        f"threads, torch {environment['torch']}; `python benchmarks/schedules.py`.",
    ]


def demo_lines() -> list[str]:
    heads = ("demo: MiniLM, SST-2 dev, batch 32, learned decisions", *COLUMNS, "accuracy", "same answers")
    lines = head(heads)
    for folder, machine in MACHINES.items():
        for dtype in DTYPES:
            row = by_contender(load(f"demo-{dtype}", folder))[SKIMMING]
            answers = [f"{row['accuracy']:.2%}", f"{row['agreement']:.1%}"]
            lines.append(line([f"skimming, {machine}", dtype, *_speedups(row), *answers]))
    figures = json.loads((ROOT / "python/transkimmer/demo/figures.json").read_text(encoding="utf-8"))
    return [
        *lines,
        "",
        f"Its own dense fine-tune: {figures['dense_accuracy']:.2%} (docs/training.md says how both were made).",
    ]


def _speedups(row: dict[str, Any]) -> list[str]:
    flops = f"{row['flops_speedup']:.2f} ({row['paper_flops_speedup']:.2f})"
    return [flops, f"{row['wall_clock_speedup']:.2f}", f"**{row['skim_efficiency']:.2f}**"]


def pages(results: Path = RESULTS) -> dict[Path, str]:
    """Every page with generated parts -> what it has to be."""
    devices = runs.load(results)
    readme = between(README.read_text(encoding="utf-8"), "results", "\n".join([*demo_lines(), ""]))
    rows = accuracy_results.read(results / accuracy_results.NAME)
    readme = between(readme, "accuracy", accuracy_tables.summary(rows))
    readme = between(readme, "small-batches", model_tables.small_batches(devices))
    found = {README: between(readme, "headline", model_tables.headline(devices))}
    if devices:
        found[ROOT / "docs/results.md"] = model_tables.page(devices) + single_runs()
    found[ROOT / "docs/accuracy.md"] = accuracy_tables.page(
        rows, accuracy_results.read_trials(results / accuracy_results.TRIALS)
    )
    paper = ROOT / "docs/paper.md"
    text = paper.read_text(encoding="utf-8")
    for name, content in paper_tables.blocks(rows).items():
        text = between(text, name, content)
    found[paper] = text
    return found


def figures(results: Path = RESULTS) -> list[plots.Figure]:
    """Every plot that the stored results suffice for."""
    rows = accuracy_results.read(results / accuracy_results.NAME)
    return [*plots.figures(runs.load(results)), *accuracy_plots.figures(rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    try:
        wanted, drawn = pages(), figures()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    stale += [ROOT / figure.path for figure in drawn if not figure.is_current(ROOT)]
    if arguments.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)}: is not what the stored results say; run: make report", file=sys.stderr)
        return int(bool(stale))
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    for figure in drawn:
        figure.draw(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
