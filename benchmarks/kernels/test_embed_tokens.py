"""`embed_tokens` on padded batches, against the operators of PyTorch that Hugging Face's embeddings are made of."""

from __future__ import annotations

import functools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.ops import cases

from .contenders import OURS, Problem, backend, measure
from .roofline import Ceilings
from .sizes import DATA_SETS, DEVICE, DTYPE, ON_GPU, WIDTH, Workload
from .timing import clock

VOCABULARY = 30522 if ON_GPU else 100


@functools.lru_cache(maxsize=1)
def problem(data_set: str) -> Problem:
    workload = Workload(data_set, None)
    # As BERT calls it by default: places counted, all of one type.
    kwargs = cases.embed_tokens(
        cases.Source(DTYPE, DEVICE), workload.lengths, width=WIDTH, positions=None, types=None, vocabulary=VOCABULARY
    )
    tokens = kwargs["input_ids"].numel()
    return Problem(
        operator="embed_tokens",
        workload=str(workload),
        variant="forward",
        state="full",
        kwargs=kwargs,
        tokens=tokens,
        capacity=tokens,
        moved=tokens * (2 * WIDTH * DTYPE.itemsize + 8),  # an id and a row of words in, a row out
        flops=0,
    )


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", dict.fromkeys([*OURS, "reference"]))
@pytest.mark.parametrize("data_set", DATA_SETS)
def test_embed_tokens(benchmark: BenchmarkFixture, data_set: str, name: str, ceilings: Ceilings) -> None:
    contender = backend("embed_tokens", name)
    contender.ours = name in OURS
    measure(benchmark, problem(data_set), contender, ceilings)
