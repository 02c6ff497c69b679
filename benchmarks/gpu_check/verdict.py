"""What a finished check says as a whole: its exit status, and in words what it did not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PASSED, FAILED, BAD_ARGUMENTS, NOT_SHOWN, AIM_MISSED = range(5)
LEFT_OUT = "left out by --only"


def not_shown(data: Mapping[str, Any]) -> list[str]:
    """What was to be shown and was not, a line each; what `--only` left out was not to be shown."""
    behind = [step for step in data["steps"][1:] if step["reason"] != LEFT_OUT]
    lines = [f"{step['name']}: {step['reason']}" for step in behind if step["status"] == "skipped"]
    if any(step["status"] != "skipped" for step in behind):
        lines += _missing_backends(data["environment"])
    if len(behind) == len(data["steps"]) - 1:
        lines += [f"{row['aim']}: not measured" for row in data["summary"] if not row["problems"]]
    return lines


def _missing_backends(environment: Mapping[str, Any] | None) -> list[str]:
    """Backends for the device that no step could run: they are part of what is to be shown."""
    if environment is None:
        return []
    lines = []
    operators = environment["operators"].values()
    if operators and (reasons := [row["triton"] for row in operators if row["triton"] != "available"]):
        lines.append(f"Triton kernels: {reasons[0]}")
    if operators and all(row["cuda"] != "available" for row in operators):
        library = environment.get("libraries", {}).get("cuda", {})
        lines.append(f"CUDA kernels: {library.get('reason') or next(iter(operators))['cuda']}")
    return lines


def missed(data: Mapping[str, Any]) -> list[str]:
    """Aims that were measured and that no backend met, a line each."""
    lines = []
    for aim in dict.fromkeys(row["aim"] for row in data["summary"] if row["problems"]):
        rows = [row for row in data["summary"] if row["aim"] == aim]
        if not any(row["met"] for row in rows):
            figures = ", ".join(f"{row['backend']} {row['geometric_mean']:.2f}" for row in rows)
            lines.append(f"{aim}: wanted {rows[0]['wanted']:g}, measured {figures}")
    return lines


def status(data: Mapping[str, Any], *, allow_no_gpu: bool) -> int:
    """0 when all that was asked for was shown; see docs/gpu-check.md for the others."""
    asked = [step for step in data["steps"][1:] if step["reason"] != LEFT_OUT]
    if any(step["status"] == "failed" for step in data["steps"]):
        return FAILED
    if data["device"] is None and asked:
        return PASSED if allow_no_gpu else FAILED
    if not_shown(data):
        return NOT_SHOWN
    return AIM_MISSED if missed(data) else PASSED
