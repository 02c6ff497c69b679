"""Runs a command so that its hanging, crashing or leaving children behind stays its own affair."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# After its limit a command is asked to end, as by Ctrl-C: pytest then still writes what it has. This long it may take.
GRACE_S = 10.0


@dataclass(frozen=True)
class Outcome:
    """How a command ended. code: exit status, negative for a signal; None: it was stopped at the limit."""

    code: int | None
    seconds: float

    @property
    def problem(self) -> str:
        """What went wrong, or an empty string."""
        if self.code is None:
            return f"stopped at its limit, after {self.seconds:.0f} s"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        return f"exit status {self.code}" if self.code else ""


def run(command: Sequence[str], *, limit_s: float, log: Path, environment: Mapping[str, str], folder: Path) -> Outcome:
    """Runs `command` in `folder`, its output appended to `log`; after `limit_s` seconds it and its children are ended.

    A command that cannot be started has status 127, and the log says why.
    """
    begin = time.monotonic()
    with log.open("ab") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                cwd=folder,
                start_new_session=True,
                # A shell makes its background jobs deaf to it, and they pass that on.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        except OSError as error:
            output.write(f"{error}\n".encode())
            return Outcome(127, time.monotonic() - begin)
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)
                process.wait(GRACE_S)
        finally:  # also when we are interrupted ourselves
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(code, time.monotonic() - begin)


def last_lines(text: str, lines: int = 40) -> str:
    return "\n".join(text.splitlines()[-lines:])
