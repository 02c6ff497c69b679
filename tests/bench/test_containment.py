"""A step of `make gpu-check` that fails, crashes or hangs is ended, and known for it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import containment, readings

# They take most of the time that pytest takes to start.
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def _run(code: str, tmp_path: Path, limit_s: float = 60.0) -> tuple[containment.Outcome, str]:
    log = tmp_path / "log"
    outcome = containment.run(
        [sys.executable, "-c", code], limit_s=limit_s, log=log, environment={"GREETING": "hello"}, folder=tmp_path
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
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import subprocess, sys, time\n"
        f"print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)\ntime.sleep(60)"
    )
    outcome, log = _run(code, tmp_path, limit_s=2.0)
    assert outcome.code is None and outcome.problem.startswith("stopped at its limit, after ")
    pid, deadline = int(log.split()[0]), time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not collected by anybody does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_stopped_pytest_still_tells_how_far_it_came(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("import time\ndef test_one(): pass\ndef test_two(): time.sleep(60)\n")
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={tmp_path}/junit.xml", "test_some.py"]
    command = [sys.executable, "-m", "pytest", *options]
    outcome = containment.run(command, limit_s=5, log=tmp_path / "log", environment=NO_PLUGINS, folder=tmp_path)
    assert outcome.code is None
    assert readings.junit(tmp_path, "").details["passed"] == 1


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    log = tmp_path / "log"
    outcome = containment.run(["no-such-program"], limit_s=5, log=log, environment={}, folder=tmp_path)
    assert outcome.code == 127
    assert "no-such-program" in log.read_text()
