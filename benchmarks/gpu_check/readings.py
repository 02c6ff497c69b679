"""What the files that a step left behind say: counts and reasons of tests, figures of benchmarks."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


@dataclass
class Reading:
    """details: for the JSON; problem: why the step failed, as far as files tell; skipped: the reason, if all of it was.

    excuses_exit: whether that reason explains a bad exit status, too; note: one line for the table; figures: rows of
    a benchmark.
    """

    details: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    skipped: str = ""
    excuses_exit: bool = False
    note: str = ""
    figures: list[dict[str, Any]] = field(default_factory=list)


def nothing(folder: Path, log: str) -> Reading:
    return Reading()


def environment(folder: Path, log: str) -> Reading:
    """The report of `transkimmer_kernels.env`."""
    path = folder / "environment.json"
    if not path.is_file():
        return Reading(problem="there is no report")
    return Reading(json.loads(path.read_text(encoding="utf-8")))


def junit(folder: Path, log: str) -> Reading:
    """From pytest's `junit.xml`; a run that was killed has left none."""
    path = folder / "junit.xml"
    if not path.is_file():
        return Reading(problem="pytest left no results")
    # The test that an interrupt fell into is listed without a name, or any outcome.
    cases = [case for case in ElementTree.parse(path).getroot().iter("testcase") if case.get("name")]
    failed, skipped = [], Counter[str]()
    for case in cases:
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            message = (bad.get("message") or "").splitlines()
            failed.append({"test": f"{case.get('classname')}.{case.get('name')}", "message": " ".join(message[:2])})
        elif (mark := case.find("skipped")) is not None:
            skipped[(mark.get("message") or "no reason given").splitlines()[0]] += 1
    passed = len(cases) - len(failed) - skipped.total()
    reading = Reading({"passed": passed, "failed": failed, "skipped": dict(skipped.most_common())})
    reading.note = f"{passed} passed, {len(failed)} failed, {skipped.total()} skipped"
    if failed:
        reading.problem = f"{len(failed)} failed, first {failed[0]['test']}"
    elif not cases:
        reading.problem = "no test was selected"
    elif not passed:
        reading.skipped = skipped.most_common(1)[0][0]
    return reading


def benchmark(folder: Path, log: str) -> Reading:
    """From pytest's results and pytest-benchmark's `benchmark.json`."""
    reading = junit(folder, log)
    path = folder / "benchmark.json"
    if not path.is_file() or not path.stat().st_size:
        reading.problem = reading.problem or "pytest-benchmark left no figures"
        return reading
    document = json.loads(path.read_text(encoding="utf-8"))
    ceilings = ("copy_bytes_per_s", "matmul_bf16_flops_per_s")
    reading.details["ceilings"] = {name: document["machine_info"].get(name) for name in ceilings}
    reading.figures = [figure(row) for row in document["benchmarks"]]
    return reading


def figure(row: dict[str, Any]) -> dict[str, Any]:
    """One benchmark as a flat row; times are those of one call, in microseconds."""
    facts, stats = dict(row["extra_info"]), row["stats"]
    per_call = 1e6 / facts["calls"]
    median, bound = per_call * stats["median"], facts.get("bound_us")
    return {
        "group": row["group"],
        **facts,
        "median_us": median,
        "iqr_us": per_call * stats["iqr"],
        "rounds": stats["rounds"],
        "roofline_share": None if bound is None else bound / median,
    }


def sanitizer(folder: Path, log: str) -> Reading:
    """From compute-sanitizer's last line; the exit status says the same."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.+)", log)
    if "Device not supported" in log:
        reason = "compute-sanitizer does not support this device (a virtual machine may hide it)"
        return Reading(skipped=reason, excuses_exit=True)
    problem = "" if summary else "compute-sanitizer gave no summary"
    return Reading({"summary": summary}, problem=problem, note=summary[-1] if summary else "")
