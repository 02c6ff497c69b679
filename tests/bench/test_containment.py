"""A step of `make gpu-check` that fails, crashes or hangs is ended, and known for it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu_check import containment, readings

# They take most of the time that pytest takes to start.
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
PATIENCE_S = 120.0


def _run(code: str, tmp_path: Path) -> tuple[containment.Outcome, str]:
    log = tmp_path / "log"
    outcome = containment.run(
        [sys.executable, "-c", code], limit_s=PATIENCE_S, log=log, environment={"GREETING": "hello"}, folder=tmp_path
    )
    return outcome, log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os; print(os.environ['GREETING'])", ""),
        ("print('hello'); raise SystemExit(3)", "exit status 3"),
        ("import os, signal; print('hello', flush=True); os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
    ],
)
def test_endings(code: str, problem: str, tmp_path: Path) -> None:
    outcome, log = _run(code, tmp_path)
    assert outcome.problem == problem
    assert log == "hello\n"


def test_a_hanging_step_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containment, "GRACE_S", 1.0)
    child = (
        "import os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print(os.getpid(), flush=True)\ntime.sleep(600)"
    )
    code = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(600)"
    log = tmp_path / "log"
    outcome = _stopped_once([sys.executable, "-c", code], tmp_path, lambda: log.read_text().endswith("\n"))
    assert outcome.code is None and outcome.problem.startswith("stopped at its limit, after ")
    pid, deadline = int(log.read_text().split()[0]), time.monotonic() + PATIENCE_S
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _stopped_once(command: list[str], folder: Path, begun: Callable[[], bool]) -> containment.Outcome:
    """What becomes of a command whose time is over as soon as it has `begun`, however long that takes."""
    log, patience = folder / "log", time.monotonic() + PATIENCE_S
    running = containment.Running(command, limit_s=math.inf, log=log, environment=NO_PLUGINS, folder=folder)
    try:
        while not begun():
            assert running.outcome() is None and time.monotonic() < patience, log.read_text()
            time.sleep(0.05)
        running._deadline = -math.inf
        while (outcome := running.outcome()) is None:
            time.sleep(0.05)
    finally:
        running.end()
    return outcome


def _alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not collected by anybody does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_stopped_pytest_still_tells_how_far_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containment, "GRACE_S", PATIENCE_S)
    begun = tmp_path / "begun"
    (tmp_path / "test_some.py").write_text(
        "import pathlib, time\ndef test_one(): pass\n"
        f"def test_two():\n    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(600)\n"
    )
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={tmp_path}/junit.xml", "test_some.py"]
    command = [sys.executable, "-m", "pytest", *options]
    outcome = _stopped_once(command, tmp_path, begun.exists)
    assert outcome.code is None
    assert readings.junit(tmp_path, "").details["passed"] == 1


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    log = tmp_path / "log"
    outcome = containment.run(["no-such-program"], limit_s=5, log=log, environment={}, folder=tmp_path)
    assert outcome.code == 127
    assert "no-such-program" in log.read_text()
