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
PAUSE_S = 0.05  # between two looks at what runs


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


class Running:
    """A command on its way in `folder`, its output appended to `log`; after `limit_s` seconds it and its children end.

    A command that cannot be started has status 127, and the log says why. `end` has to be called.
    """

    def __init__(
        self, command: Sequence[str], *, limit_s: float, log: Path, environment: Mapping[str, str], folder: Path
    ) -> None:
        self._begin = time.monotonic()
        self._deadline = self._begin + limit_s
        self._late = False
        self._process: subprocess.Popen[bytes] | None = None
        with log.open("ab") as output:
            try:
                self._process = subprocess.Popen(
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

    def outcome(self) -> Outcome | None:
        """None while it runs."""
        now = time.monotonic()
        if self._process is None:
            return Outcome(127, now - self._begin)
        code = self._process.poll()
        if code is None and now < self._deadline:
            return None
        if code is None and not self._late:
            self._late, self._deadline = True, now + GRACE_S
            self._signal(signal.SIGINT)
            return None
        self.end()
        return Outcome(None if self._late else code, time.monotonic() - self._begin)

    def end(self) -> None:
        """Of the command and whatever it has started; also when we are interrupted ourselves."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def run(command: Sequence[str], *, limit_s: float, log: Path, environment: Mapping[str, str], folder: Path) -> Outcome:
    """Runs one command, see `Running`."""
    running = Running(command, limit_s=limit_s, log=log, environment=environment, folder=folder)
    try:
        while (outcome := running.outcome()) is None:
            time.sleep(PAUSE_S)
    finally:
        running.end()
    return outcome


def last_lines(text: str, lines: int = 40) -> str:
    return "\n".join(text.splitlines()[-lines:])
