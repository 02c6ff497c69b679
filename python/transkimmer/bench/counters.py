"""What a run costs besides its time: memory, kernels launched, and how often the host waits for the device."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from .timing import synchronize

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Calls of the CUDA runtime and driver, as the profiler names them.
_LAUNCH = re.compile(r"(cuda|cu)(LaunchKernel|LaunchCooperativeKernel|GraphLaunch)")
_WAIT = re.compile(r"(cuda|cu)(Stream|Device|Event|Ctx)Synchronize|cudaMemcpy$|cuMemcpy(DtoH|HtoD)_v2$")


class PeakMemory:
    """Bytes that a contender takes: from where the process stood before it was built to the peak while it runs.

    So the model's own copy, prepared weights, caches and working memory all count. On CUDA it is what torch has
    allocated; on a CPU the resident memory of the process, which Linux alone tells.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._before = self._now()

    def reset(self) -> None:
        """From here on the peak counts: what building took and gave back does not."""
        gc.collect()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif _RESET.exists():
            _give_back()
            _RESET.write_text("5", encoding="ascii")  # the peak becomes what is resident now

    def peak(self) -> int | None:
        """Bytes; None where the system does not tell."""
        highest = torch.cuda.max_memory_allocated() if self._cuda else _resident("VmHWM")
        return None if highest is None or self._before is None else max(0, highest - self._before)

    def _now(self) -> int | None:
        # A model with skimming is in a cycle. One of an earlier contender, collected only while this one is built,
        # would be taken for memory that this one gave back.
        gc.collect()
        if self._cuda:
            synchronize("cuda")
            return torch.cuda.memory_allocated()
        _give_back()
        return _resident("VmRSS")


def _give_back() -> None:
    """Freed memory goes back to the system, so that it is not taken for memory in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _resident(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


@dataclass(frozen=True)
class Launches:
    """Of one forward. kernels: on the device; launches: calls by the host, a graph counting one; host_syncs: waits."""

    kernels: int
    launches: int
    host_syncs: int


def count_launches(run: Callable[[], object]) -> Launches:
    """Of one call, which must have warmed up, under the profiler; on a CUDA device."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with torch.profiler.record_function("transkimmer::counted"):
            run()
        synchronize("cuda")  # not within the range
    return launches_of((event.name, event.device_type.name, event.time_range) for event in profiler.events())


def launches_of(events: Iterable[tuple[str, str, object]]) -> Launches:
    """From (name, "CPU" or "CUDA", range with `start` and `end`), inside the range that `count_launches` marks."""
    found = list(events)
    mark = next(times for name, device, times in found if name == "transkimmer::counted" and device == "CPU")
    inside = [name for name, device, times in found if device == "CPU" and mark.start <= times.start <= mark.end]  # type: ignore[attr-defined]
    return Launches(
        kernels=sum(device == "CUDA" and not _is_mark(name) for name, device, _ in found),
        launches=sum(_LAUNCH.match(name) is not None for name in inside),
        host_syncs=sum(_WAIT.match(name) is not None for name in inside),
    )


def _is_mark(name: str) -> bool:
    """Copies and fills are no kernels, and ranges also show among the device's events."""
    return name.startswith(("Memcpy", "Memset", "transkimmer::"))
