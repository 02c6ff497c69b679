"""The document `gpu-check.json`, and the short table made from it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

SCHEMA = 1
STATUSES = ("passed", "failed", "skipped")


@dataclass
class StepResult:
    """What became of one step; `reason` is empty when it passed, `note` says more in either case."""

    name: str
    purpose: str
    status: str
    reason: str
    note: str
    seconds: float
    limit_s: float
    command: list[str]
    details: dict[str, Any]
    log_tail: str  # of a step that failed


@dataclass(frozen=True)
class Aim:
    """A ratio that the project wants: median of `rival` over median of ours on the same problem; for one, a time."""

    name: str
    operators: tuple[str, ...]
    state: str | None
    variants: tuple[str, ...] | None
    rival: str | None  # {ours} stands for the backend; None: the aim is a time in microseconds
    wanted: float

    def met_by(self, value: float) -> bool:
        return value <= self.wanted if self.rival is None else value >= self.wanted

    def takes(self, row: dict[str, Any]) -> bool:
        return (
            row["operator"] in self.operators
            and self.state in (None, row["state"])
            and (self.variants is None or row["variant"] in self.variants)
        )


_FUSIONS, _PRODUCTS = ("gather", "gelu", "norm"), ("qkv", "out", "ffn_in", "ffn_out")
AIMS = (
    Aim("attention, full lengths, over varlen_attn", ("ragged_attention",), "full", None, "varlen_attn", 1.0),
    Aim("attention, skimmed lengths, over varlen_attn", ("ragged_attention",), "skimmed", None, "varlen_attn", 1.5),
    Aim("product over cuBLAS at the exact row count", ("ragged_linear",), None, _PRODUCTS, "cublas_exact", 0.9),
    Aim(
        "fused product over unfused",
        ("ragged_linear", "ragged_linear_norm"),
        None,
        _FUSIONS,
        "unfused_{ours}",
        1.2,
    ),
    Aim("skim_logit over eager PyTorch", ("skim_logit",), None, None, "eager", 2.0),
    Aim("skim_logit over torch.compile", ("skim_logit",), None, None, "compiled", 2.0),
    Aim("compact at 64k tokens, in microseconds", ("compact",), None, None, None, 8.0),
)


def ratios(figures: Iterable[dict[str, Any]], aim: Aim) -> dict[str, list[float]]:
    """Backend of ours -> its ratio (or time) on every problem of the aim on which both sides were measured."""
    rows = [row for row in figures if aim.takes(row)]
    times = {(row["group"], row["contender"]): row["median_us"] for row in rows}
    found: dict[str, list[float]] = {}
    for row in rows:
        if not row["ours"]:
            continue
        ours = row["contender"]
        rival = None if aim.rival is None else times.get((row["group"], aim.rival.format(ours=ours)))
        if aim.rival is None:
            found.setdefault(ours, []).append(row["median_us"])
        elif rival is not None:
            found.setdefault(ours, []).append(rival / row["median_us"])
    return found


def summary(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per aim and backend; without a measurement its figures are None."""
    rows = []
    for aim in AIMS:
        found = ratios(figures, aim) or {"": []}
        for ours, values in found.items():
            row: dict[str, Any] = {"aim": aim.name, "wanted": aim.wanted, "backend": ours or None}
            row |= {"problems": len(values), "geometric_mean": None, "smallest": None, "largest": None, "met": None}
            if values:
                row["geometric_mean"] = mean = statistics.geometric_mean(values)
                row["met"] = aim.met_by(mean)
                row["smallest"], row["largest"] = min(values), max(values)
            rows.append(row)
    return rows


def document(
    facts: dict[str, Any], environment: dict[str, Any] | None, steps: list[StepResult], figures: list[dict[str, Any]]
) -> dict[str, Any]:
    """facts: date, commit, device, versions; see `machine.facts`."""
    return {
        "schema": SCHEMA,
        **facts,
        "summary": summary(figures),
        "steps": [asdict(step) for step in steps],
        "figures": figures,
        "environment": environment,
    }


def show(data: dict[str, Any], console: Console) -> None:
    """The table that stands last in the output."""
    device = data["device"]
    where = f"{device['name']}, driver {device['driver']}" if device else "no GPU here"
    steps = Table(box=None)
    for heading, justify in (("step", "left"), ("status", "left"), ("s", "right"), ("", "left")):
        steps.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for step in data["steps"]:
        text = "; ".join(filter(None, (step["reason"], step["note"])))
        steps.add_row(step["name"], step["status"], f"{step['seconds']:.0f}", text, style=_STYLES[step["status"]])
    aims = Table(box=None)
    for heading in ("wanted", "", "backend", "geometric mean", "range", "problems"):
        aims.add_column(heading, justify="left" if heading in ("", "backend") else "right")
    for row in data["summary"]:
        if not row["problems"]:
            aims.add_row(f"{row['wanted']:g}", row["aim"], "", "not measured")
            continue
        spread = f"{row['smallest']:.2f} to {row['largest']:.2f}"
        mean = f"{row['geometric_mean']:.2f}"
        style = "" if row["met"] else "yellow"
        aims.add_row(f"{row['wanted']:g}", row["aim"], row["backend"], mean, spread, str(row["problems"]), style=style)
    console.print(f"gpu-check on {where}, commit {data['commit']}", highlight=False)
    console.print(steps)
    console.print(aims)


_STYLES = {"passed": "", "failed": "bold red", "skipped": "yellow"}
