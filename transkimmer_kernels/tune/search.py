"""Measures every candidate of a shape class, and keeps the fastest that is right."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import tuning
from ..tuning import Tunable
from .problems import Call

# A candidate as good as this is not worth another compiled kernel, or is noise.
_MARGIN = 0.98


@dataclass(frozen=True)
class Oracle:
    """The right result of one call, and how far plain PyTorch in the call's dtype is from it (relative, by norm)."""

    exact: Tensor
    error: float
    unit: float

    @classmethod
    def of(cls, call: Call, dtype: torch.dtype) -> Oracle:
        exact = call("reference", torch.float64)
        return cls(exact, _distance(call("reference", dtype), exact), torch.finfo(dtype).eps)

    def check(self, result: Tensor) -> None:
        """ValueError unless the result is no farther than twice what PyTorch is."""
        distance = _distance(result, self.exact)
        if not distance <= 2 * self.error + self.unit:  # also for NaN
            raise ValueError(f"wrong result: off by {distance:.2g}, PyTorch by {self.error:.2g}")


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


@dataclass
class Found:
    """The best configuration of a shape class; times in microseconds, one per row count.

    dropped: candidate -> why it was not used; complete: whether every candidate was tried.
    """

    config: Any
    times: list[float]
    default_times: list[float]
    tried: int
    dropped: dict[str, str] = field(default_factory=dict)
    complete: bool = True

    def entry(self) -> dict[str, Any]:
        """Its form in a file."""
        entry = {"config": self.config._asdict(), "us": self.times, "default_us": self.default_times}
        return entry | {"tried": self.tried, "complete": self.complete, "dropped": self.dropped}


def search(
    tunable: Tunable[Any],
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    calls: list[Call],
    seconds: Callable[[Callable[[], Tensor]], float],
    *,
    deadline: float = float("inf"),
) -> Found:
    """Tries the default, every candidate and what the best of them make together, by the geometric mean of the times.

    A candidate is a change of the default. Most touch what serves many rows or what serves few, so the best changes
    that touch different fields are tried together in the end: all combinations would take too long to compile.

    Args:
        calls: from a `Problem`, one per row count.
        seconds: times one call of a function.
        deadline: of `time.monotonic`, past which no further candidate is tried.

    Raises:
        Exception: the default itself fails or is wrong.
    """
    oracles = [Oracle.of(call, dtype) for call in calls]

    def measure(config: Any) -> list[float]:
        times = []
        with tuning.forced(tunable.operator, config):
            for call, oracle in zip(calls, oracles, strict=True):
                oracle.check(call("triton", dtype))
                _refuse_waiting(lambda call=call: call("triton", dtype))  # type: ignore[misc]
                times.append(round(1e6 * seconds(lambda call=call: call("triton", dtype)), 3))  # type: ignore[misc]
        return times

    default = tunable.default(dtype, *sizes)
    measured = measure(default)
    found = Found(default, measured, measured, tried=1)
    timed: dict[Any, float] = {}

    def attempt(config: Any) -> None:
        found.tried += 1
        try:
            times = measure(config)
        except Exception as error:  # does not compile, needs too much shared memory, is wrong, waits for the device
            found.dropped[str(config)] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return
        timed[config] = statistics.geometric_mean(times)
        if timed[config] < _MARGIN * statistics.geometric_mean(found.times):
            found.config, found.times = config, times

    for config in dict.fromkeys(tunable.candidates(dtype, *sizes)):
        if config == default:
            continue
        if time.monotonic() > deadline:
            found.complete = False
            return found
        attempt(config)
    limit = _MARGIN * statistics.geometric_mean(measured)
    together = _together(default, [config for config in sorted(timed, key=timed.__getitem__) if timed[config] < limit])
    if together != default and together not in timed:
        attempt(together)
    return found


def _together(default: Any, better: Sequence[Any]) -> Any:
    """The changes of `better`, best first, as far as no field is touched twice."""
    changes: dict[str, Any] = {}
    for config in better:
        own = {name: value for name, value in config._asdict().items() if value != getattr(default, name)}
        if not own.keys() & changes.keys():
            changes |= own
    return default._replace(**changes)


def _refuse_waiting(run: Callable[[], Tensor]) -> None:
    """RuntimeError if the call makes the host wait for the device: a library's product may, in a fallback."""
    if not torch.cuda.is_available():
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
