"""Renders the stored results into README and docs, and their plots; `--check` fails where these are not current.

    python -m benchmarks.report [--check]     # or: make report

Two kinds of results: single runs of `transkimmer bench` in files named after them, which have tables of their own here,
and the dated files that `bench model`, `bench training` and `profile` add to with `--results` (`runs.py`,
`model_tables.py`, `plots.py`). Accuracy is a table of its own, `accuracy.csv` (`accuracy_results.py`,
`accuracy_tables.py`, `accuracy_plots.py`), and stands beside the paper's figures (`paper_tables.py`). Checking needs no
matplotlib: a plot holds the hash of what it shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import accuracy_plots, accuracy_results, accuracy_tables, model_tables, paper_tables, plots, runs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/cpu"
AVX2 = ROOT / "benchmarks/results/cpu-avx2"
README = ROOT / "README.md"
TASKS, DTYPES = ("mrpc", "sst2", "rte", "imdb"), ("fp32", "bf16")
COLUMNS = ("dtype", "FLOPs × (paper's count)", "wall-clock ×", "**skim efficiency**")
PADDED, PLAIN, OURS, SKIMMING = range(4)  # order of a result's rows


def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def table() -> str:
    """The README's tables as Markdown."""
    lines = [
        *schedule_lines("AVX-512, oneDNN's products", RESULTS),
        "",
        *demo_lines(),
        "",
        *peer_lines(),
    ]
    return "\n".join(lines)


def single_runs() -> str:
    """The end of `docs/results.md`: AVX2 at the batch size of AVX-512; the README has AVX2 at a larger one."""
    lines = schedule_lines("AVX2, products of our own", AVX2)
    return "\n".join(["", f"## {AVX2.name} at batch 16", "", *lines, ""])


def schedule_lines(machine: str, folder: Path) -> list[str]:
    results = {name: load(name, folder) for name in (f"{task}-{dtype}" for task in TASKS for dtype in DTYPES)}
    heads = ("lengths, schedule", *COLUMNS, "spread", "× padded HF", "our dense × plain PyTorch")
    lines = [_line(heads), _line(["---"] * len(heads))]
    for name, result in results.items():
        task, dtype = name.split("-")
        rows = result["rows"]
        skimming, padded = rows[SKIMMING], rows[PADDED]
        over_padded = padded["median_s"] / skimming["median_s"]
        dense = rows[PLAIN]["median_s"] / rows[OURS]["median_s"]
        spread = "–" if skimming["spread"] is None else f"{skimming['spread']:.0%}"
        lines.append(_line([task, dtype, *_speedups(skimming), spread, f"{over_padded:.2f}", f"{dense:.2f}"]))
    environment = next(iter(results.values()))["environment"]
    return [
        *lines,
        "",
        f"BERT-base shape, batch 16, {environment['processor']} ({machine}), {environment['threads']} threads, "
        f"torch {environment['torch']}; `python benchmarks/schedules.py`.",
    ]


def peer_lines() -> list[str]:
    """Speed of every contender over our dense run, by lengths and dtype; `–` where it was not timed."""
    files = sorted(RESULTS.glob("peers-*.json"))
    results = {file.stem.removeprefix("peers-"): load(file.stem)["rows"] for file in files}
    names = [
        row["name"]
        for row in next(iter(results.values()))
        if any(_speed(rows, row["name"]) for rows in results.values())
    ]
    lines = [_line(["speed over our dense run", *results]), _line(["---"] * (len(results) + 1))]
    for name in names:
        speeds = (_speed(rows, name) for rows in results.values())
        lines.append(_line([name, *(f"{speed:.2f}" if speed else "–" for speed in speeds)]))
    environment = load(files[0].stem)["environment"]
    return [
        *lines,
        "",
        f"BERT-base shape, batch 16, {environment['processor']} (AVX-512, oneDNN's products), {environment['threads']} "
        "threads, with versions in `benchmarks/results/cpu/peers-*.json`.",
    ]


def _speed(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    return next((row.get("speed") for row in rows if row["name"] == name), None)


def demo_lines() -> list[str]:
    heads = ("demo: MiniLM, SST-2 dev, batch 32, learned decisions", *COLUMNS, "accuracy", "same answers")
    lines = [_line(heads), _line(["---"] * len(heads))]
    runs = [(dtype, "AVX2", load(f"demo-{dtype}", AVX2)) for dtype in DTYPES]
    runs += [(dtype, "AVX-512", load(f"demo-{dtype}")) for dtype in DTYPES]
    for dtype, machine, result in runs:
        row = result["rows"][SKIMMING]
        answers = [f"{row['accuracy']:.2%}", f"{row['agreement']:.1%}"]
        lines.append(_line([f"skimming, {machine}", dtype, *_speedups(row), *answers]))
    figures = json.loads((ROOT / "python/transkimmer/demo/figures.json").read_text(encoding="utf-8"))
    return [
        *lines,
        "",
        f"Its own dense fine-tune: {figures['dense_accuracy']:.2%} (docs/training.md says how both were made).",
    ]


def _speedups(row: dict[str, Any]) -> list[str]:
    flops = f"{row['flops_speedup']:.2f} ({row['paper_flops_speedup']:.2f})"
    return [flops, f"{row['wall_clock_speedup']:.2f}", f"**{row['skim_efficiency']:.2f}**"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def between(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of `name`."""
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{content}{end}{after}"


def pages(results: Path = RESULTS.parent) -> dict[Path, str]:
    """Every page with generated parts -> what it has to be."""
    devices = runs.load(results)
    readme = between(README.read_text(encoding="utf-8"), "results", table() + "\n")
    found = {README: between(readme, "headline", model_tables.headline(devices))}
    if devices:
        found[ROOT / "docs/results.md"] = model_tables.page(devices) + single_runs()
    rows = accuracy_results.read(results / accuracy_results.NAME)
    found[ROOT / "docs/accuracy.md"] = accuracy_tables.page(
        rows, accuracy_results.read_trials(results / accuracy_results.TRIALS)
    )
    paper = ROOT / "docs/paper.md"
    text = paper.read_text(encoding="utf-8")
    for name, content in paper_tables.blocks(rows).items():
        text = between(text, name, content)
    found[paper] = text
    return found


def figures(results: Path = RESULTS.parent) -> list[plots.Figure]:
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
