"""`accuracy.csv`: a row per trained model and point of its accuracy-speed curve, added whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from transkimmer_kernels.files import write_whole

from .results import place

# date, commit, device; the training: task to pruned; the point of its curve: decision, calibrated_to; bf16: whether it
# was trained in autocast; metric: its name; dense: that metric of the dense fine-tune on the development rows; value,
# held_out_value: of the model on these and on held-out training rows; flops_speedup: without padding; tokens_kept:
# JSON, by layer. forward_value: of the training forward without noise, where `value` is of removal; forward_difference:
# of a logit at most, over the largest logit.
TRAINING = ("task", "backbone", "mode", "seed", "skim_weight", "pruned")
POINT = (*TRAINING, "decision", "calibrated_to")
COLUMNS = (
    *("date", "commit", "device", *POINT, "bf16", "metric", "dense", "value", "held_out_value"),
    *("flops_speedup", "flops_speedup_padded", "wall_clock_speedup", "skim_efficiency", "tokens_kept", "seconds_train"),
    *("forward_value", "forward_agreement", "forward_difference"),
)

Row = dict[str, str]


def to_text(values: Mapping[str, Any]) -> Row:
    """As it stands in the file: None is empty, a list is JSON, numbers have at most six digits."""
    return {column: _text(values.get(column)) for column in COLUMNS}


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps([round(part, 4) for part in value]) if isinstance(value, list) else str(value)


def read(path: Path) -> list[Row]:
    """All rows, none where there is no file.

    Raises:
        ValueError: other columns than `COLUMNS`, or a row that has more or fewer; names file and line.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        if tuple(header) != COLUMNS:
            raise ValueError(f"{path}, line 1: has the columns {header}, but they must be {list(COLUMNS)}")
        rows = []
        for values in lines:
            if len(values) != len(COLUMNS):
                raise ValueError(f"{path}, line {lines.line_num}: has {len(values)} values, must have {len(COLUMNS)}")
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def add(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows in one step; a row takes the place of an older one of the same point. Several processes may do so."""
    with FileLock(f"{path}.lock"):
        merged = {identity(row, POINT): row for row in read(path)}
        for values in rows:
            row = to_text(values)
            merged[identity(row, POINT)] = row
        _write(path, merged.values())


def update(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Sets `columns` of the stored rows of the same points in one step, and nothing else; adds no row."""
    with FileLock(f"{path}.lock"):
        stored = read(path)
        found = {identity(row, POINT): row for row in stored}
        for values in rows:
            row = to_text(values)
            if (old := found.get(identity(row, POINT))) is not None:
                old |= {column: row[column] for column in columns}
        _write(path, stored)


def _write(path: Path, rows: Iterable[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def identity(row: Mapping[str, Any], columns: Sequence[str] = TRAINING) -> tuple[str, ...]:
    """What tells a training, or with `POINT` a row, from others; the same on another CPU, but not on a GPU."""
    return place(row["device"]), *(_text(row[column]) for column in columns)
