"""What `make gpu-check` says at its end: the exit status, and what it did not show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import verdict

ROOT = Path(__file__).parents[2]


def _environment(**backends: str) -> dict[str, Any]:
    return {"operators": {"compact": {"triton": "available", "cuda": "available", **backends}}}


def _data(*skipped: str, environment_of: Any = None, met: bool | None = True) -> dict[str, Any]:
    steps_of = [{"name": "environment", "status": "passed", "reason": ""}]
    steps_of += [{"name": "conformance", "status": "passed", "reason": ""}]
    steps_of += [{"name": f"step {i}", "status": "skipped", "reason": reason} for i, reason in enumerate(skipped)]
    row = {"aim": "an aim", "wanted": 2.0, "backend": "triton", "problems": met is not None, "met": met}
    row["geometric_mean"] = None if met is None else 1.5 + met
    return {"device": {"name": "NVIDIA H200"}, "environment": environment_of, "steps": steps_of, "summary": [row]}


@pytest.mark.parametrize(
    ("data", "status", "lines"),
    [
        (_data(), 0, []),
        (_data(verdict.LEFT_OUT, met=None), 0, []),
        (_data("no time was left of 1 minutes"), 3, ["step 0: no time was left of 1 minutes"]),
        (_data("compute-sanitizer was not found", met=False), 3, ["step 0: compute-sanitizer was not found"]),
        (_data(environment_of=_environment(cuda="not built")), 3, ["CUDA kernels: not built"]),
        (_data(environment_of=_environment(triton="not installed")), 3, ["Triton kernels: not installed"]),
        (_data(met=None), 3, ["an aim: not measured"]),
        (_data(met=False), 4, []),
    ],
)
def test_what_was_not_shown_shows_in_the_exit_status(data: dict[str, Any], status: int, lines: list[str]) -> None:
    assert verdict.not_shown(data) == lines
    assert verdict.status(data, allow_no_gpu=False) == status


def test_an_aim_is_missed_when_no_backend_meets_it() -> None:
    data = _data(met=False)
    assert verdict.missed(data) == ["an aim: wanted 2, measured triton 1.50"]
    data["summary"].append({**data["summary"][0], "backend": "cuda", "geometric_mean": 2.1, "met": True})
    assert verdict.missed(data) == []


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu_check.__main__ import main

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("rich", "hypothesis") else name)
    assert main([]) == 2
    assert capsys.readouterr().err == f"gpu-check: {sys.executable} lacks rich, hypothesis (docs/gpu-check.md)\n"


def test_the_command_starts_without_any_package() -> None:
    """What is missing is looked for before anything but the standard library is imported."""
    program = (
        "import sys, runpy; sys.argv = ['gpu-check']; runpy.run_module('benchmarks.gpu_check', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
