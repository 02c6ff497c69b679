"""Runs the steps, one process each, and keeps the files of results complete after every one of them.

Nothing of the package is imported here: a library that crashes on being loaded must end one step, not the check.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from . import containment, machine, report
from .readings import Reading
from .steps import Step, environment_step, steps
from .verdict import LEFT_OUT


class UnknownStep(ValueError):
    """A step was asked for that does not exist; the message lists those that do."""


def check(out: Path, minutes: float, only: list[str] | None = None) -> dict[str, Any]:
    """Runs everything, at most `minutes` long, and returns the document that it wrote to `out`/gpu-check.json.

    Args:
        out: folder for gpu-check.json and gpu-check.log; made if it does not exist.
        only: names of the steps to run, behind the environment report, which is always made; None: all.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu-check.log"
    log.write_bytes(b"")
    deadline = time.monotonic() + 60 * minutes
    first, reading = run_step(environment_step(), 60, log)
    environment = reading.details or None
    todo = steps(environment)
    names = [first.name, *(step.name for step in todo)]
    if unknown := set(only or ()) - set(names):
        raise UnknownStep(f"no step {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    facts, results, figures = machine.facts(environment), [first], []
    data: dict[str, Any] = {}
    for step in todo:
        left = deadline - time.monotonic()
        reason = LEFT_OUT if only and step.name not in only else step.reason
        if left < 5:
            reason = reason or f"no time was left of {minutes:g} minutes"
        if reason:
            results.append(skipped(step, reason))
        else:
            result, reading = run_step(step, min(step.limit_s, left), log)
            results.append(result)
            figures += reading.figures
        data = report.document(facts, environment, results, figures)
        part = out / "gpu-check.json.part"
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(part, out / "gpu-check.json")
    return data


def skipped(step: Step, reason: str) -> report.StepResult:
    return report.StepResult(
        step.name, step.purpose, "skipped", reason, "", 0.0, step.limit_s, list(step.command), {}, ""
    )


def run_step(step: Step, limit_s: float, log: Path) -> tuple[report.StepResult, Reading]:
    """Runs one step in a folder of its own; its output is appended to `log`."""
    print(f"{step.name}: {step.purpose} (at most {limit_s:.0f} s) ...", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        command = [part.replace("{folder}", name) for part in step.command]
        own_log = folder / "log"
        outcome = containment.run(
            command, limit_s=limit_s, log=own_log, environment=_environment(step), folder=machine.ROOT
        )
        text = own_log.read_text(encoding="utf-8", errors="replace")
        with log.open("a", encoding="utf-8") as file:
            file.write(f"==== {step.name}: {' '.join(command)}\n{text}\n")
        try:
            reading = step.read(folder, text)
        except Exception as error:  # files that were cut short, or are not what they should be
            reading = Reading(problem=f"its results cannot be read: {type(error).__name__}: {error}")
    problem = "; ".join(filter(None, (outcome.problem, reading.problem)))
    status, reason = ("failed", problem) if problem else ("passed", "")
    if reading.skipped and (reading.excuses_exit or not problem):
        status, reason = "skipped", reading.skipped
    result = report.StepResult(
        name=step.name,
        purpose=step.purpose,
        status=status,
        reason=reason,
        note=reading.note,
        seconds=outcome.seconds,
        limit_s=limit_s,
        command=command,
        details=reading.details,
        log_tail=containment.last_lines(text) if status == "failed" else "",
    )
    return result, reading


def _environment(step: Step) -> dict[str, str]:
    """The step's variables, and the checkout where Python looks first: it need not be installed."""
    path = [str(machine.ROOT), str(machine.ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return {**step.environment, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
