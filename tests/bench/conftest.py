"""What the bench tests have in common: a tiny model to time, a day that does not end, and memory by count of calls."""

from __future__ import annotations

import datetime
from types import SimpleNamespace

import pytest
from transkimmer import SkimConfig, add_skimming
from transkimmer.bench import field, peers, results, training

from ..models.tiny import tiny
from .tiny_workload import RATIOS


@pytest.fixture
def subject() -> peers.Subject:
    skimming = add_skimming(tiny("bert", "sequence"), SkimConfig(schedule=RATIOS))
    return peers.Subject("tiny", tiny("bert", "sequence"), skimming, "synthetic")


@pytest.fixture
def one_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither midnight nor a change of the checkout comes between two runs."""
    monkeypatch.setenv("GPU_CHECK_COMMIT", "c0ffee")
    noon = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.timezone.utc)
    clock = SimpleNamespace(datetime=SimpleNamespace(now=lambda zone: noon), timezone=datetime.timezone)
    monkeypatch.setattr(results, "datetime", clock)


@pytest.fixture
def memory_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of memory counters, in turn; the first peak is 1000 bytes, later ones are 50.

    Also for tests that are not about memory: the real counters collect all garbage at every call.
    """
    calls: list[str] = []

    class Counter:
        def __init__(self, device: str) -> None:
            calls.append("watch")

        def reset(self) -> None:
            calls.append("reset")

        def peak(self) -> int:
            calls.append("peak")
            return 1000 if calls.count("peak") == 1 else 50

    monkeypatch.setattr(field, "PeakMemory", Counter)
    monkeypatch.setattr(training, "PeakMemory", Counter)
    return calls
