"""The commands `bench model` and `bench training`."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..arguments import check_least, check_outputs
from . import model, training
from .contenders import SKIMMING
from .field import Field
from .peers import PEERS, Subject
from .results import Store
from .setting import Setting, device_of, prepare, settings
from .setting import add_arguments as add_setting
from .show import spread_text
from .timing import HOPELESS, Limits
from .workload import Batch

_WIDTH = 210  # where the output is no terminal
NOTHING = "–"

Rows = Sequence[dict[str, Any]]


def add_commands(bench: argparse.ArgumentParser) -> None:
    """Adds the sub-commands to the parser of `bench`, which without one times the demo or a schedule."""
    commands = bench.add_subparsers(dest="part", metavar="{model,training}", required=False)
    text = "time one model against every peer: Hugging Face, torch.compile, nested tensors, ONNX Runtime, OpenVINO"
    parser = commands.add_parser("model", help=text, description=text)
    _add_common(parser)
    parser.add_argument(
        "--without", nargs="+", default=[], choices=[p.key for p in PEERS if not p.ours], help="peers to leave out"
    )
    parser.set_defaults(run=run_model)
    text = "time a training step: dense, skimming by masks as published, and skimming on packed tokens"
    parser = commands.add_parser("training", help=text, description=text)
    _add_common(parser)
    parser.set_defaults(run=run_training)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_setting(parser, many=True)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the timing")
    parser.add_argument(
        "--slow",
        type=float,
        metavar="TIMES",
        help=f"a contender this much slower than ours, dense: timed once; default {HOPELESS:g}, on a GPU no limit",
    )
    parser.add_argument(
        "--budget", type=float, default=60.0, metavar="S", help="seconds for each contender and workload"
    )
    add_outputs(parser)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the environment")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="add the rows to <device>/<date>-<commit>.json")


def run_model(arguments: argparse.Namespace) -> int:
    limits = _limits(arguments)
    field = Field(arguments.without, limits.budget_s)

    def measure(setting: Setting, subject: Subject, batches: Sequence[Batch]) -> Rows:
        return model.measure(setting, subject, batches, field, arguments.repeats, limits)

    return _run(arguments, measure, model_table)


def run_training(arguments: argparse.Namespace) -> int:
    def measure(setting: Setting, subject: Subject, batches: Sequence[Batch]) -> Rows:
        return training.measure(setting, subject, batches, arguments.repeats, limits)

    limits = _limits(arguments)
    return _run(arguments, measure, training_table)


def _limits(arguments: argparse.Namespace) -> Limits:
    check_least(arguments, repeats=1)
    slow = arguments.slow
    if slow is None:
        slow = math.inf if device_of(arguments) == "cuda" else HOPELESS
    if not slow > 1:  # nor NaN
        raise ValueError(f"--slow {slow}: must be above 1")
    if not arguments.budget > 0:
        raise ValueError(f"--budget {arguments.budget}: must be above 0")
    return Limits(slow, arguments.budget)


def console_of() -> Console:
    return Console(width=None if os.isatty(1) else _WIDTH)


def _run(
    arguments: argparse.Namespace,
    measure: Callable[[Setting, Subject, Sequence[Batch]], Rows],
    table_of: Callable[[Rows, str], Table],
) -> int:
    check_outputs(arguments, ("json",))
    console, store = console_of(), None
    for setting in settings(arguments):
        setting, subject, batches = prepare(setting, arguments.kernels)
        store = store or Store(setting.device, file=arguments.json, folder=arguments.results)
        rows = measure(setting, subject, batches)
        store.add(rows)
        console.print(table_of(rows, str(setting)))
    for path in store.paths if store else []:
        console.print(f"wrote {path}")
    return 0


_TIMES = ("median", "±", "repeats", "tokens/s")


def model_table(rows: Rows, title: str) -> Table:
    headings = [*_TIMES, "roofline", "FLOPs ×", "padded ×", "wall-clock ×", "efficiency"]
    headings += ["skimming is ×", "launches", "syncs", "peak MiB", "difference"]
    table = _table(title, headings)
    for row in rows:
        if row["note"] is not None:
            continue
        table.add_row(
            row["contender"],
            *_time_cells(row),
            f"{row['roofline_share']:.0%}",
            f"{row['flops_speedup']:.2f}",
            f"{row['flops_speedup_padded']:.2f}",
            *(_times(row.get(key)) for key in ("wall_clock_speedup", "skim_efficiency")),
            _times(_over(rows, SKIMMING, row["contender"])),
            *(NOTHING if row[key] is None else str(row[key]) for key in ("launches", "host_syncs")),
            _mebibytes(row["peak_memory"]),
            f"{row['max_difference']:.0e}",
        )
    left_out = [f"{row['contender']}: {row['note']}" for row in rows if row["note"] is not None]
    table.caption, table.caption_justify = "\n".join(left_out) or None, "left"
    return table


def training_table(rows: Rows, title: str) -> Table:
    table = _table(title, [*_TIMES, "packed skimming is ×", "tokens kept", "peak MiB", "loss difference"])
    for row in rows:
        table.add_row(
            row["contender"],
            *_time_cells(row),
            _times(_over(rows, training.PACKED, row["contender"])),
            NOTHING if row["tokens_kept"] is None else f"{row['tokens_kept']:.0%}",
            _mebibytes(row["peak_memory"]),
            f"{row['max_difference']:.0e}",
        )
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _time_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The median is that of one batch."""
    milliseconds = 1e3 * row["median_s"] / row["workload"]["batches"]
    return f"{milliseconds:.1f} ms", spread_text(row["spread"]), str(row["repeats"]), f"{row['tokens_per_s']:,.0f}"


def _over(rows: Rows, name: str, other: str) -> float | None:
    """How many times faster `name` is than `other`."""
    return next((row["speedups"].get(other) for row in rows if row["contender"] == name and "speedups" in row), None)


def _times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _mebibytes(value: int | None) -> str:
    return NOTHING if value is None else f"{value / 2**20:,.0f}"
