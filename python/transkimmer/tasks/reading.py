"""Rows of a task: from its official files or from the hub, checked row by row."""

from __future__ import annotations

import csv
import lzma
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data import Example
from .files import open_text
from .squad import HUB_COLUMNS, questions_of_hub, read_questions
from .table import QuestionTask, Task, TextTask


def load_split(task: Task, split: str, folder: str | os.PathLike[str] | None = None) -> list[Any]:
    """All rows of one split, in the order of the source: an `Example` each, of a `QuestionTask` a `Question`.

    Args:
        split: "train" or "dev", for some tasks also others; `Task.files` says which.
        folder: with the official files, or with a folder of the task's title that has them; None: from the hub.

    Raises:
        FileNotFoundError: no such folder, or none of the split's files in it.
        ValueError: an unknown split, an empty file, a missing column, a label out of range; names file and line.
    """
    if folder is None:
        return _from_hub(task, split)
    if split not in task.files:
        raise ValueError(f"split {split!r}: {task.title} has {', '.join(task.files)}")
    path = _find(task, split, Path(folder))
    if isinstance(task, QuestionTask):
        return read_questions(path, unanswerable=task.has_unanswerable)
    assert isinstance(task, TextTask)
    examples = read_folder_per_class(path, task) if path.is_dir() else read_table(path, task)
    if split == "train" and path.name.removesuffix(".xz") in task.holds_dev:
        return _without_dev(examples, path, task, Path(folder))
    return examples


def read_table(path: Path, task: TextTask) -> list[Example]:
    """Reads a tab-separated, unquoted UTF-8 file, with `task.columns`; `.xz` is unpacked."""
    examples: list[Example] = []
    short = 0
    with open_text(path) as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header, number, places = 0, 0, task.columns
        try:
            if isinstance(places[0], str):
                header, places = 1, _places(path, next(rows, []), task)
            needed = max(int(place) for place in places) + 1
            for number, row in enumerate(rows, start=header + 1):
                if len(row) >= needed:
                    examples.append(_example(task, [row[int(p)] for p in places], f"{path}, line {number}"))
                elif task.skips_short_rows:
                    short += 1
                else:
                    raise ValueError(
                        f"{path}, line {number}: has {len(row)} columns, but {task.title} needs {needed}: {row}"
                    )
        except (csv.Error, UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
            raise ValueError(f"{path}, after line {number}: {error}") from error
    if short:
        warnings.warn(f"{path}: {short} rows with missing columns left out", stacklevel=2)
    if not examples:
        raise ValueError(f"{path}: has no rows")
    return examples


def read_folder_per_class(path: Path, task: TextTask) -> list[Example]:
    """Reads a folder with a folder per class and a text (Latin-1) per file, as 20 Newsgroups is published."""
    known = task.file_labels or {}
    examples = []
    for group in sorted(path.iterdir()):
        if group.name not in known:
            raise ValueError(f"{group}: is none of the {len(known)} classes of {task.title}")
        for file in sorted(group.iterdir(), key=lambda file: (len(file.name), file.name)):
            examples.append(Example(file.read_text(encoding="latin-1"), known[group.name]))
    if not examples:
        raise ValueError(f"{path}: has no rows")
    return examples


def _without_dev(examples: list[Example], path: Path, task: TextTask, folder: Path) -> list[Example]:
    """The rows whose texts are not those of a development row, where there are development rows to be judged on."""
    try:
        dev = _find(task, "dev", folder)
    except FileNotFoundError:
        return examples
    judged_on = {_texts(example) for example in read_table(dev, task)}
    kept = [example for example in examples if _texts(example) not in judged_on]
    if len(kept) < len(examples):
        warnings.warn(
            f"{path}: {len(examples) - len(kept)} rows left out, which are development rows in {dev}", stacklevel=3
        )
    return kept


def _texts(example: Example) -> tuple[str, str]:
    return example.text.strip(), (example.pair or "").strip()


def _find(task: Task, split: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {folder}: no such folder")
    names = [name + suffix for name in task.files[split] for suffix in ("", ".xz")]
    own = folder / (task.folder or task.title)
    for parent in (folder, own):
        for name in names:
            if (parent / name).exists():
                return parent / name
    raise FileNotFoundError(f"--data {folder}: has none of {', '.join(names)}, nor has {own}")


def _places(path: Path, header: list[str], task: TextTask) -> tuple[int, ...]:
    if not header:
        raise ValueError(f"{path}: is empty")
    missing = [column for column in task.columns if column not in header]
    if missing:
        raise ValueError(f"{path}, line 1: no column {', '.join(map(repr, missing))} in the header {header}")
    return tuple(header.index(str(column)) for column in task.columns)


def _example(task: TextTask, values: list[str], place: str) -> Example:
    *texts, text_label = values
    return Example(texts[0], _label(task, text_label, task.file_labels, place), texts[1] if len(texts) > 1 else None)


def _label(task: TextTask, value: Any, known: Mapping[str, int] | None, place: str) -> int | float:
    if task.is_regression:
        low, high = task.score_range
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not low <= number <= high:
            raise ValueError(f"{place}: score {value!r}: must be a number from {low:g} to {high:g}")
        return number
    labels = {str(number): number for number in range(len(task.classes))} if known is None else known
    if str(value) not in labels:
        raise ValueError(f"{place}: label {value!r}: must be one of {', '.join(labels)}")
    return labels[str(value)]


def _from_hub(task: Task, split: str) -> list[Any]:
    if split not in task.hub_splits:
        raise ValueError(f"split {split!r}: {task.title} has {', '.join(task.hub_splits)} on the hub")
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{task.title}: without --data it is read from the hub, which needs: pip install transkimmer[train]"
        ) from None
    name = task.hub_name
    try:
        rows = datasets.load_dataset(*task.hub, split=task.hub_splits[split])
    except Exception as error:  # whatever the hub's client raises: offline, no such data set, no disk space
        raise OSError(
            f"{name}: not to be had from the hub ({error}); name a folder with its files: --data DIR"
        ) from error
    columns = task.hub_columns if isinstance(task, TextTask) else HUB_COLUMNS
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(f"{name}: no column {', '.join(map(repr, missing))} among {rows.column_names}")
    if isinstance(task, QuestionTask):
        found: list[Any] = questions_of_hub(rows, name, unanswerable=task.has_unanswerable)
    else:
        assert isinstance(task, TextTask)
        found = list(_hub_examples(task, rows, name))
    if not found:
        raise ValueError(f"{name}: has no rows")
    return found


def _hub_examples(task: TextTask, rows: Any, name: str) -> Iterator[Example]:
    *texts, label = task.hub_columns
    for number, row in enumerate(rows):
        values = [row[column] for column in texts]
        number_label = _label(task, row[label], None, f"{name}, row {number}")
        yield Example(values[0], number_label, values[1] if len(values) > 1 else None)
