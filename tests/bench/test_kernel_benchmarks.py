"""benchmarks/kernels where no GPU is: that it works, and that it claims no time; its timing on an imagined device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import readings
from benchmarks.kernels import roofline, timing
from benchmarks.kernels.contenders import Contender, Problem, first_rows, measure
from benchmarks.kernels.sizes import Workload

from ..ops import cases

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("interpreted", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_the_benchmarks_work(interpreted: str, tmp_path: Path) -> None:
    """On tiny CPU tensors; every result is checked and nothing is timed, which their output must not suggest either."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/kernels"]
    environment_of = {**os.environ, "TRITON_INTERPRET": interpreted, "CUDA_VISIBLE_DEVICES": ""}
    options = [f"--junitxml={tmp_path}/junit.xml", f"--benchmark-json={tmp_path}/benchmark.json"]
    run = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment_of, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    tested = readings.junit(tmp_path, "")
    assert tested.details["passed"] >= 60 and not tested.problem
    assert "Min" not in run.stdout and "benchmark:" not in run.stdout
    file = tmp_path / "benchmark.json"
    assert not file.exists() or not file.read_text() or not json.loads(file.read_text())["benchmarks"]


# The measured problems


def test_workloads_shrink_with_the_layers_under_one_capacity() -> None:
    full, *skimmed = [Workload("mrpc", layer) for layer in (None, 0, 4, 8, 11)]
    assert full.spare == 0 and full.lengths == full.full
    counts = [sum(workload.lengths) for workload in (full, *skimmed)]
    assert counts == sorted(counts, reverse=True) and min(skimmed[-1].lengths) >= 1
    assert all(sum(workload.lengths) + workload.spare == sum(full.full) for workload in skimmed)


def _problem(tokens: int = 7) -> Problem:
    kwargs = cases.ragged_linear(cases.Source(torch.bfloat16, spare=3), (tokens,), width=32, out=8, gather=False)
    return Problem("ragged_linear", "x", "try", "full", kwargs, tokens, tokens + 3, 1000, 10)


class Benchmark:
    """What `measure` needs of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group = ""
        self.options: dict[str, Any] = {}
        self.calls = 0

    def pedantic(self, run: Any, **options: Any) -> None:
        self.options = options
        for _ in range(options.get("iterations", 1)):
            run()
            self.calls += 1


@pytest.mark.parametrize("ours", [False, True])
def test_no_contender_is_timed_for_a_wrong_result(ours: bool) -> None:
    def prepare(kwargs: dict[str, Any]) -> Any:
        return lambda: torch.nn.functional.linear(kwargs["x"], kwargs["weight"])  # forgets the bias

    benchmark, outcome = Benchmark(), AssertionError if ours else pytest.skip.Exception
    with pytest.raises(outcome, match="error"):
        measure(benchmark, _problem(), Contender("hasty", prepare, first_rows, ours=ours), roofline.Ceilings())
    assert not benchmark.calls


def test_a_contender_that_cannot_take_part_says_why() -> None:
    absent = Contender("absent", lambda kwargs: pytest.fail("prepared"), first_rows, reason="is not built")
    with pytest.raises(pytest.skip.Exception, match="absent: is not built"):
        measure(Benchmark(), _problem(), absent, roofline.Ceilings())


def test_the_bound_is_the_larger_of_two_times() -> None:
    ceilings = roofline.Ceilings(bytes_per_s=1e6, flops_per_s=1e9)
    assert ceilings.bound_us(moved=2, flops=1000) == pytest.approx(2.0)
    assert ceilings.bound_us(moved=2, flops=5000) == pytest.approx(5.0)
    assert roofline.Ceilings().bound_us(1, 1) is None


# Timing


def test_copies_lie_in_memory_of_their_own() -> None:
    """Views of one projection stay views of one projection, with their strides and what lies beyond the count."""
    kwargs = cases.ragged_attention(cases.Source(torch.bfloat16), (5, 3))
    copy = timing.duplicate(kwargs)
    assert list(copy) == list(kwargs)
    for name in "qkv":
        ours, given = copy[name], kwargs[name]
        assert ours.stride() == given.stride() and torch.equal(ours.nan_to_num(), given.nan_to_num())
        assert ours.data_ptr() != given.data_ptr()
        assert ours.untyped_storage().data_ptr() == copy["q"].untyped_storage().data_ptr()
    assert copy["max_seqlen_q"] == kwargs["max_seqlen_q"]


class Event:
    """Of an imagined device on which a millisecond passes between any two events."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.now += 1.0
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


@pytest.fixture
def imagined(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A device with a cache of 10 kB; calls run on the CPU, also when a graph of them is replayed."""
    state = SimpleNamespace(captured=0, capture_error=None)

    class Graph:
        def replay(self) -> None:
            state.captured += 1

    @contextmanager
    def graph(_: Graph) -> Iterator[None]:
        if state.capture_error:
            raise RuntimeError(state.capture_error)
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Event": Event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": contextmanager(lambda stream: iter([None])),
        "CUDAGraph": Graph,
        "graph": graph,
        "synchronize": lambda: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=10_000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "ON_GPU", True)
    monkeypatch.setattr(timing, "clock", timing.DeviceClock())
    return state


def _right(kwargs: dict[str, Any]) -> Any:
    return lambda: torch.nn.functional.linear(kwargs["x"], kwargs["weight"], kwargs["bias"])


def test_a_timed_row(imagined: SimpleNamespace) -> None:
    benchmark, ceilings = Benchmark(), roofline.Ceilings(1e9, 1e9)
    measure(benchmark, _problem(), Contender("rival", _right, first_rows), ceilings)
    facts = benchmark.extra_info
    assert facts["calls"] == 30  # of 1000 bytes each: three times the cache
    assert facts["bound_us"] == 1.0 and facts["host_us"] > 0
    assert benchmark.options == {"rounds": timing.ROUNDS, "warmup_rounds": 2, "iterations": 2}  # of 1 ms, for 2 ms
    assert imagined.captured == 1 + 2
    assert benchmark.group == "ragged_linear try x"
    row = {"group": benchmark.group, "extra_info": facts, "stats": {"median": 3e-5, "iqr": 3e-6, "rounds": 20}}
    figure = readings.figure(row)
    assert figure["median_us"] == pytest.approx(1.0) and figure["roofline_share"] == pytest.approx(1.0)


@pytest.mark.parametrize("ours", [False, True])
def test_a_failing_capture(ours: bool, imagined: SimpleNamespace) -> None:
    imagined.capture_error = "operation not permitted when stream is capturing"
    outcome = RuntimeError if ours else pytest.skip.Exception
    with pytest.raises(outcome, match="operation not permitted"):
        measure(Benchmark(), _problem(), Contender("x", _right, first_rows, ours=ours), roofline.Ceilings())


def test_the_clock_sums_up_what_events_say(imagined: SimpleNamespace) -> None:
    clock = timing.DeviceClock()
    assert [clock() for _ in range(3)] == pytest.approx([0.0, 0.001, 0.002])
