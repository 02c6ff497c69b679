"""`results/accuracy.csv`, a row per model and point of its accuracy-speed curve, and its means over seeds."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..markdown import NOTHING

NAME, TRIALS = "accuracy.csv", "accuracy-trials.csv"
DENSE = "dense"

Row = dict[str, Any]


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _score(text: str) -> float:
    if not -1 <= (value := _number(text)) <= 1:
        raise ValueError
    return value


def _speedup(text: str) -> float:
    if not (value := _number(text)) > 0:
        raise ValueError
    return value


def _shares(text: str) -> list[float]:
    values = json.loads(text)
    if not isinstance(values, list) or not values or not all(0 <= float(value) <= 1 for value in values):
        raise ValueError
    return [float(value) for value in values]


def _flag(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError
    return text == "True"


def _name(text: str) -> str:
    if not text:
        raise ValueError
    return text


# Column -> (reads it, what is allowed, whether it may be empty, which is read as None).
_COLUMNS: dict[str, tuple[Callable[[str], Any], str, bool]] = {
    **dict.fromkeys(("date", "task", "backbone", "mode", "metric"), (_name, "some text", False)),
    **dict.fromkeys(("commit", "device", "decision"), (_name, "some text", True)),
    "seed": (int, "an integer", False),
    **dict.fromkeys(("skim_weight", "calibrated_to", "seconds_train"), (_number, "a finite number", True)),
    **dict.fromkeys(("pruned", "bf16"), (_flag, "True or False", True)),
    "value": (_score, "a number from -1 to 1", False),
    **dict.fromkeys(("dense", "held_out_value", "forward_value"), (_score, "a number from -1 to 1", True)),
    "flops_speedup": (_speedup, "a number > 0", False),
    **dict.fromkeys(
        ("flops_speedup_padded", "wall_clock_speedup", "skim_efficiency"), (_speedup, "a number > 0", True)
    ),
    **dict.fromkeys(("forward_agreement", "forward_difference"), (_number, "a finite number", True)),
    "tokens_kept": (_shares, "a JSON list of shares from 0 to 1", True),
}


def read(path: Path) -> list[Row]:
    """Rows with numbers for numbers; none where there is no file, or nothing in it.

    Raises:
        ValueError: a column is missing, or a value is not what its column holds; names file, line and column.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file)
        missing = [name for name in _COLUMNS if lines.fieldnames is not None and name not in lines.fieldnames]
        if missing:
            raise ValueError(f"{path}: has no column {', '.join(missing)}")
        return [_row(f"{path}, line {lines.line_num}", line) for line in lines]


def read_trials(path: Path) -> list[dict[str, str]]:
    """Rows of `trials.py` as they stand; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def place(device: str | None) -> str:
    """Where rows of the same training may stand for one another: any CPU, or a kind of GPU."""
    return "cpu" if not device or device.startswith("cpu") else device


def _row(where: str, line: dict[str, Any]) -> Row:
    if None in line or None in line.values():
        raise ValueError(f"{where}: has {'more' if None in line else 'fewer'} values than there are columns")
    row: Row = {}
    for name, (parse, allowed, optional) in _COLUMNS.items():
        text = line[name]
        if not text and optional:
            row[name] = None
            continue
        try:
            row[name] = parse(text)
        except ValueError:
            raise ValueError(f"{where}: {name}={text!r}: must be {allowed}") from None
    return row


@dataclass(frozen=True)
class Mean:
    """Over seeds. spread: standard deviation of a sample; None where there is a single seed."""

    value: float
    spread: float | None
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Mean | None:
        """None where nothing was measured."""
        found = [value for value in values if value is not None]
        if not found:
            return None
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))

    def data(self) -> list[float | None]:
        """[value, spread], as a plot stores them."""
        return [self.value, self.spread]


@dataclass(frozen=True)
class Configuration:
    """What was trained, how it decides, and the rows of its seeds. mode: with the settings that differ from it."""

    place: str
    task: str
    backbone: str
    metric: str
    mode: str
    skim_weight: float | None
    pruned: bool | None
    decision: str | None
    calibrated_to: float | None
    rows: tuple[Row, ...]

    def mean(self, column: str) -> Mean | None:
        return Mean.of(row[column] for row in self.rows)

    @property
    def training(self) -> str:
        """In words; the same for all points of one curve."""
        where = "" if self.place == "cpu" else f", {self.place}"
        return f"{self.mode}{', pruned' if self.pruned else ''}{where}"

    @property
    def point(self) -> str:
        """How it decides, in words."""
        if self.calibrated_to is not None:
            return f"calibrated to {self.calibrated_to:g}"
        return self.decision or NOTHING

    @property
    def tokens_kept(self) -> list[float] | None:
        """By layer, the mean over seeds."""
        found = [row["tokens_kept"] for row in self.rows if row["tokens_kept"] is not None]
        return [statistics.fmean(layer) for layer in zip(*found, strict=True)] if found else None


_KEY = ("task", "backbone", "metric", "mode", "skim_weight", "pruned", "decision", "calibrated_to")


def configurations(rows: Sequence[Row]) -> list[Configuration]:
    """In a stable order; of a seed that was run more than once, the newest row counts."""
    newest: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        newest[(place(row["device"]), *(row[name] for name in _KEY), row["seed"])] = row
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for (*key, _), row in newest.items():
        groups.setdefault(tuple(key), []).append(row)
    found = [Configuration(*(*key, tuple(sorted(group, key=lambda row: row["seed"])))) for key, group in groups.items()]
    return sorted(found, key=_order)


def _order(found: Configuration) -> tuple[Any, ...]:
    numbers = (0.0 if value is None else value for value in (found.skim_weight, found.calibrated_to))
    names = (found.task, found.backbone, found.metric, found.mode != DENSE, found.mode, bool(found.pruned))
    return *names, found.place, found.decision or "", *numbers


def panels(found: Iterable[Configuration]) -> dict[tuple[str, str, str], list[Configuration]]:
    """(task, backbone, metric) -> its configurations."""
    groups: dict[tuple[str, str, str], list[Configuration]] = {}
    for configuration in found:
        groups.setdefault((configuration.task, configuration.backbone, configuration.metric), []).append(configuration)
    return groups


def dense(found: Iterable[Configuration]) -> Mean | None:
    """Of one panel: the dense fine-tunes, each one once, from rows of their own or from those compared with them."""
    rows = sorted((row for configuration in found for row in configuration.rows), key=lambda row: row["date"])
    values = {(place(row["device"]), row["seed"]): row["dense"] for row in rows if row["dense"] is not None}
    values |= {(place(row["device"]), row["seed"]): row["value"] for row in rows if row["mode"] == DENSE}
    return Mean.of(values.values())
