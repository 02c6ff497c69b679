"""A clock that only its own `sleep` moves: who is timed by it takes as long on a busy machine as on an idle one."""

from __future__ import annotations

import pytest


class Clock:
    """In place of `time.perf_counter` until the test is over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self._now)

    def sleep(self, seconds: float) -> None:
        self._now += seconds
