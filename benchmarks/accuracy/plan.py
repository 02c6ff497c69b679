"""How long the trainings of a table may take, by those that are stored."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path

from transkimmer.tasks import TEXT_TASKS, load_split

from .stored import Row
from .training import Training


def estimates(trainings: Sequence[Training], rows: Sequence[Row], data: Path | None) -> list[float | None]:
    """Seconds each of `trainings` may take, None where there is nothing to go by.

    By stored rows of the same task and mode, which needs no data; else by the rate of the backbone's other rows.
    """
    rows = [row for row in rows if row["seconds_train"]]
    same: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        same.setdefault((row["backbone"], row["task"], row["mode"]), []).append(float(row["seconds_train"]))
    rates: dict[str, float | None] = {}
    found: list[float | None] = []
    for training in trainings:
        if known := same.get((training.name, training.task, str(training.columns["mode"]))):
            found.append(statistics.median(known))
            continue
        if training.name not in rates:
            rates[training.name] = _rate(training, rows, data)
        rate = rates[training.name]
        found.append(None if rate is None or data is None else rate * _work_of(training, data))
    return found


def _rate(training: Training, rows: Sequence[Row], data: Path | None) -> float | None:
    """Seconds per `_work_of` of what is stored for the training's backbone; None without rows or data."""
    rows = [row for row in rows if row["backbone"] == training.name]
    if not rows or data is None:
        return None
    rates = []
    for row in rows:
        mode, seed = row["mode"].split()[0], int(row["seed"])
        stored = dataclasses.replace(training, task=row["task"], mode=mode, seed=seed, settings=())
        rates.append(float(row["seconds_train"]) / _work_of(stored, data))
    return statistics.median(rates)


def _work_of(training: Training, data: Path) -> float:
    """Epochs times characters, to which the time of a training is roughly proportional."""
    recipe = training.recipe
    epochs = recipe.dense_epochs if training.mode == "dense" else recipe.epochs
    return epochs * _characters(training.task, data)


@functools.cache
def _characters(task: str, data: Path) -> int:
    rows = load_split(TEXT_TASKS[task], "train", data)
    return sum(len(row.text) + len(row.pair or "") for row in rows)


def show(left: Sequence[Training], seconds: Sequence[float | None]) -> None:
    """A line per training, and a total."""
    for training, estimate in zip(left, seconds, strict=True):
        print(f"{training.folder}: {'?' if estimate is None else f'about {estimate:.0f}'} s")
    known = [estimate for estimate in seconds if estimate is not None]
    unknown = f", {len(left) - len(known)} of them not known" if len(known) < len(left) else ""
    print(f"total of {len(left)}: about {sum(known):.0f} s ({sum(known) / 3600:.1f} h){unknown}")
