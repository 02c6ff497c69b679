"""`compact` at 64k tokens, against the best that PyTorch's operators do without reading the count back."""

from __future__ import annotations

import functools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from transkimmer.bench.workload import known_lengths

from tests.ops import cases

from .contenders import OURS, Problem, backend, measure
from .roofline import Ceilings
from .sizes import COMPACT_TOKENS, DEVICE, DTYPE
from .timing import clock

KEPT = 0.8


@functools.cache
def problem() -> Problem:
    lengths: list[int] = []
    missing = COMPACT_TOKENS
    while missing:
        real = known_lengths()["mrpc"]
        lengths.append(min(real[len(lengths) % len(real)], missing))
        missing -= lengths[-1]
    source = cases.Source(DTYPE, DEVICE, spare=0)
    kwargs = cases.compact(source, lengths, probability=KEPT, keep_first=True)
    kept = int(kwargs["keep"].sum())
    return Problem(
        operator="compact",
        workload=f"{COMPACT_TOKENS}-tokens",
        variant=f"keep-{KEPT}",
        state="full",
        kwargs=kwargs,
        tokens=COMPACT_TOKENS,
        capacity=COMPACT_TOKENS,
        moved=COMPACT_TOKENS + 8 * kept + 8 * (len(lengths) + 1),  # the mask, slots in and out, offsets in and out
        flops=0,
    )


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", dict.fromkeys([*OURS, "reference"]))
def test_compact(benchmark: BenchmarkFixture, name: str, ceilings: Ceilings) -> None:
    contender = backend("compact", name)
    contender.ours = name in OURS
    measure(benchmark, problem(), contender, ceilings)
