"""Checks a contender against the reference, then times it: kernels apart from launches, inputs cold in the L2 cache.

The call is captured in a CUDA graph over several copies of its inputs, weights included, which together are larger than
the L2 cache; what is timed are replays of the graph, so that the host's work is not in it. That work is measured beside
it, as the time it takes to enqueue one call (`host_us`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from .sizes import ON_GPU

Kwargs = dict[str, Any]
Call = Callable[[], Any]
ROUNDS = 20
_ROUND_SECONDS = 2e-3  # of the device; launching the first graph of a round costs about a hundredth of it
_MAX_COPIES = 256


class DeviceClock:
    """Seconds of the device's own time, for pytest-benchmark; of the host where there is no device."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._last: torch.cuda.Event | None = None

    def __call__(self) -> float:
        if not ON_GPU:
            return time.perf_counter()
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        if self._last is not None:  # summed up here: an event's own time is a float32
            self._seconds += self._last.elapsed_time(now) / 1e3
        self._last = now
        return self._seconds


clock = DeviceClock()


def copies(kwargs: Kwargs, touched: int) -> list[Kwargs]:
    """So many copies of the arguments, `touched` bytes of each in use, that no L2 cache holds them all."""
    if not ON_GPU:
        return [kwargs]
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(max(math.ceil(3 * cache / max(touched, 1)), 2), _MAX_COPIES)
    return [kwargs, *(duplicate(kwargs) for _ in range(count - 1))]


def duplicate(kwargs: Kwargs) -> Kwargs:
    """Every tensor in memory of its own, with its strides; views of one memory stay views of one memory."""
    memory: dict[int, torch.UntypedStorage] = {}

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        storage = x.untyped_storage()
        if storage.data_ptr() not in memory:
            memory[storage.data_ptr()] = storage.clone()
        return x.new_empty(0).set_(memory[storage.data_ptr()], x.storage_offset(), x.size(), x.stride())

    return {name: copy(x) for name, x in kwargs.items()}


def run(benchmark: BenchmarkFixture, calls: list[Call], facts: dict[str, Any], *, ours: bool) -> None:
    """Times `calls`, one per copy of the inputs, of a contender that has been checked; without a device runs the first.

    Args:
        facts: what is known of the row besides its time; stored with it.
        ours: whether a failing capture is our fault. A rival that cannot be captured is skipped, with its message.
    """
    benchmark.extra_info.update(facts, calls=len(calls))
    if not ON_GPU:
        benchmark.pedantic(calls[0])
        return
    host = _host_seconds(calls)
    try:
        graph = _capture(calls)
    except RuntimeError as error:
        if ours:
            raise
        pytest.skip(f"{facts['contender']} cannot be captured in a CUDA graph: {str(error).splitlines()[0]}")
    begin = clock()
    graph.replay()
    once = clock() - begin
    benchmark.extra_info["host_us"] = 1e6 * host
    benchmark.pedantic(
        graph.replay, rounds=ROUNDS, warmup_rounds=2, iterations=max(1, math.ceil(_ROUND_SECONDS / max(once, 1e-9)))
    )


def _host_seconds(calls: list[Call]) -> float:
    """Median time to enqueue one call, after some that compile; the device is idle at first and never waited for."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    times = []
    for call in (calls * 8)[:32]:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return sorted(times)[len(times) // 2]


def _capture(calls: list[Call]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # whatever a first call on a stream sets up must not be captured
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph, results = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for call in calls:
            results.append(call())  # held, so that every call writes to memory of its own, too
    torch.cuda.synchronize()
    return graph
