"""Runs the steps, a process each, and keeps the files of results complete after every one of them.

Nothing of the package is imported here: a library that crashes on being loaded must end one step, not the check.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
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
    facts, results = machine.facts(environment), [first]
    figures: list[Any] = []

    def write() -> dict[str, Any]:
        ordered = sorted(results, key=lambda result: names.index(result.name))
        data = report.document(facts, environment, ordered, figures)
        part = out / "gpu-check.json.part"
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(part, out / "gpu-check.json")
        return data

    for group in side_by_side(todo):
        ready = []
        left = deadline - time.monotonic()
        for step in group:
            reason = LEFT_OUT if only and step.name not in only else step.reason
            if left < 5:
                reason = reason or f"no time was left of {minutes:g} minutes"
            if reason:
                results.append(skipped(step, reason))
            else:
                ready.append((step, min(step.limit_s, left)))
        for result, reading in run_steps(ready, log):
            results.append(result)
            figures += reading.figures
            write()
    return write()


def side_by_side(todo: Sequence[Step]) -> list[list[Step]]:
    """Neighbours that take no times run at once: most of what they do is compiling, on one core each."""
    groups: list[list[Step]] = []
    for step in todo:
        if groups and not step.alone and not groups[-1][-1].alone:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def skipped(step: Step, reason: str) -> report.StepResult:
    return report.StepResult(
        step.name, step.purpose, "skipped", reason, "", 0.0, step.limit_s, list(step.command), {}, ""
    )


def run_step(step: Step, limit_s: float, log: Path) -> tuple[report.StepResult, Reading]:
    """Runs one step in a folder of its own; its output is appended to `log`."""
    return next(iter(run_steps([(step, limit_s)], log)))


def run_steps(steps: Sequence[tuple[Step, float]], log: Path) -> Iterator[tuple[report.StepResult, Reading]]:
    """Starts steps, each with its limit in seconds, and yields them as they end."""
    with contextlib.ExitStack() as stack:
        waiting = [_Trial(step, limit_s, stack) for step, limit_s in steps]
        while waiting:
            for trial in [*waiting]:
                if (outcome := trial.running.outcome()) is not None:
                    waiting.remove(trial)
                    yield trial.finish(outcome, log)
            time.sleep(containment.PAUSE_S)


class _Trial:
    """A step on its way, in a folder of its own."""

    def __init__(self, step: Step, limit_s: float, stack: contextlib.ExitStack) -> None:
        print(f"{step.name}: {step.purpose} (at most {limit_s:.0f} s) ...", flush=True)
        self._step, self._limit_s = step, limit_s
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-check-"))
        self._folder = Path(name)
        self._command = [part.replace("{folder}", name) for part in step.command]
        environment = _environment(step)
        self.running = containment.Running(
            self._command, limit_s=limit_s, log=self._folder / "log", environment=environment, folder=machine.ROOT
        )
        stack.callback(self.running.end)

    def finish(self, outcome: containment.Outcome, log: Path) -> tuple[report.StepResult, Reading]:
        """What became of it, and what its files say; its output is appended to `log`."""
        step = self._step
        text = (self._folder / "log").read_text(encoding="utf-8", errors="replace")
        with log.open("a", encoding="utf-8") as file:
            file.write(f"==== {step.name}: {' '.join(self._command)}\n{text}\n")
        try:
            reading = step.read(self._folder, text)
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
            limit_s=self._limit_s,
            command=self._command,
            details=reading.details,
            log_tail=containment.last_lines(text) if status == "failed" else "",
        )
        return result, reading


def _environment(step: Step) -> dict[str, str]:
    """The step's variables, and the checkout where Python looks first: it need not be installed."""
    path = [str(machine.ROOT), str(machine.ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return {**step.environment, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
