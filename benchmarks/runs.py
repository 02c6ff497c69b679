"""The dated runs under `benchmarks/results/<device>/`: of every workload and contender the newest row with figures."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transkimmer.bench.results import only_says_why

Row = dict[str, Any]
Workload = dict[str, Any]


@dataclass
class Device:
    """What was measured on one device. environments: of the runs, by commit, the newest last."""

    name: str
    rows: list[Row] = field(default_factory=list)
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind]

    def groups(self, kind: str) -> list[tuple[Workload, dict[str, Row]]]:
        """(workload, contender -> row) in a stable order: model, dtype, lengths, batch size."""
        found: dict[str, tuple[Workload, dict[str, Row]]] = {}
        for row in self.of_kind(kind):
            key = json.dumps(row["workload"], sort_keys=True)
            found.setdefault(key, (row["workload"], {}))[1][row["contender"]] = row
        return sorted(found.values(), key=lambda group: order(group[0]))


def order(workload: Workload) -> tuple[Any, ...]:
    return workload["model"], workload["dtype"] != "fp32", workload["lengths"], workload["batch_size"]


def load(folder: Path) -> list[Device]:
    """One `Device` for every folder that holds dated runs."""
    devices = []
    for path in sorted(folder.iterdir()):
        documents = [json.loads(file.read_text(encoding="utf-8")) for file in path.glob("2???-??-??-*.json")]
        if documents:
            devices.append(merge(path.name, documents))
    return devices


def merge(name: str, documents: Iterable[dict[str, Any]]) -> Device:
    """The newest row of each contender; of a workload that was timed over other numbers of batches, the last time's.

    A row without figures, of a contender that a later run left out, takes the place of none that has some.
    """
    device = Device(name)
    newest: dict[str, Row] = {}
    batches: dict[str, Any] = {}
    for document in sorted(documents, key=lambda document: document["date"]):
        device.environments[document["commit"]] = document["environment"]
        for row in document["rows"]:
            key, count = json.dumps([row["kind"], row["workload"], row["contender"]], sort_keys=True), _any_batches(row)
            if only_says_why(row):
                if only_says_why(newest.setdefault(key, row)):
                    newest[key] = row
                batches.setdefault(count, row["workload"].get("batches"))
            else:
                newest[key] = row
                batches[count] = row["workload"].get("batches")
    device.rows = [row for row in newest.values() if row["workload"].get("batches") == batches[_any_batches(row)]]
    return device


def _any_batches(row: Row) -> str:
    return json.dumps([row["kind"], {**row["workload"], "batches": None}], sort_keys=True)


def short_name(contender: str) -> str:
    """For the head of a column or a legend: `dense, padded (OpenVINO)` -> `OpenVINO`, `dense, ... (ours)` -> `ours`."""
    return contender.partition("(")[2].removesuffix(")") or contender
