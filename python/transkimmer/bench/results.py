"""Results as data: a JSON document of rows with what they were had with, one file per device, day and commit."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from transkimmer_kernels.files import write_whole

from .environment import environment, generation
from .peers import PEERS, versions

SCHEMA = 1
# What tells rows apart: one of the same kind, workload and contender takes the place of an older one (see `merge`).
_IDENTITY = ("kind", "workload", "contender")


def device_name(device: str) -> str:
    """Folder of the device's results: `cpu-avx2`, `cpu-avx512-zen-5`, or the GPU's name in lower case."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"cpu-{torch.backends.cpu.get_cpu_capability()} {generation() or ''}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """Of the checkout that this package is imported from, marked where its files have changes; else "unknown".

    GPU_CHECK_COMMIT names it where the files came without their history.
    """
    if named := os.environ.get("GPU_CHECK_COMMIT"):
        return named[:10]
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    if not git("ls-files", here.name):  # installed inside another project's checkout
        return "unknown"
    head = git("rev-parse", "--short=10", "HEAD") or "unknown"
    return f"{head}-changed" if git("status", "--porcelain", "--untracked-files=no") else head


def document(device: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    packages = sorted({package for peer in PEERS for package in peer.packages})
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name(device),
        "environment": {**environment(), "peers": versions(packages)},
        "rows": list(rows),
    }


class Store:
    """Keeps rows in one file as they come in, so that an interrupted run has lost nothing.

    Args:
        device: "cpu" or "cuda".
        file: written anew.
        folder: gets `<device>/<date>-<commit>.json`; rows that it holds stay where they are not measured again.
    """

    def __init__(self, device: str, *, file: Path | None = None, folder: Path | None = None) -> None:
        self._device = device
        self._rows: list[dict[str, Any]] = []
        head = document(device, [])
        self._targets: list[tuple[Path, list[dict[str, Any]]]] = [] if file is None else [(file, [])]
        if folder is not None:
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"--results {folder}: must be a folder, or a place for one")
            path = folder / head["device"] / f"{head['date'][:10]}-{head['commit']}.json"
            if file is not None and file.resolve() == path.resolve():
                raise ValueError(f"--json {file}: must be another file than that of --results")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"--results {folder}: cannot be made ({error.strerror})") from None
            self._targets.append((path, _stored_rows(path, head["environment"])))

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = merge(self._rows, rows)
        for path, before in self._targets:
            merged = document(self._device, merge(before, self._rows))
            write_whole(path, json.dumps(merged, indent=1, ensure_ascii=False) + "\n")

    @property
    def paths(self) -> list[Path]:
        return [path for path, _ in self._targets]


def merge(before: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`before` without the rows that `rows` measure again, then `rows`.

    A row that only says why there are no figures (`note`) replaces none that has some: a run `--without` a contender
    leaves what an earlier one has measured.
    """
    measured = {_identity(row) for row in before if not only_says_why(row)}
    rows = [row for row in rows if not only_says_why(row) or _identity(row) not in measured]
    new = {_identity(row) for row in rows}
    return [*(row for row in before if _identity(row) not in new), *rows]


def only_says_why(row: dict[str, Any]) -> bool:
    """Whether a row has a note in the place of figures; one of a training step may have both."""
    return row.get("note") is not None and "median_s" not in row


def _identity(row: dict[str, Any]) -> str:
    return json.dumps([row.get(key) for key in _IDENTITY], sort_keys=True)


def _stored_rows(path: Path, here: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run; ValueError where it was another machine's or other packages', whose rows do not mix."""
    if not path.exists():
        return []
    stored = json.loads(path.read_text(encoding="utf-8"))
    ours, theirs = ({k: v for k, v in e.items() if k != "threads"} for e in (here, stored["environment"]))
    if json.loads(json.dumps(ours)) != theirs:
        raise ValueError(f"{path}: holds rows of another environment; move it away, or write elsewhere")
    return stored["rows"]
