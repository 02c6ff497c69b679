"""`add_norm` and `choose_rows`, both ways, against the operators of PyTorch that their references are made of."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from tests.ops import cases
from tests.ops.operators import SPECS
from transkimmer_kernels.library import OPERATORS
from transkimmer_kernels.registry import why_not

from .contenders import OURS, Contender, Problem, backend, measure
from .roofline import Ceilings
from .sizes import DEVICE, DTYPE, ROW_WORKLOADS, WIDTH, Workload
from .timing import Call, Kwargs, clock

# Rows read and written: by the operator, and by its backward.
PASSES = {"add_norm": (4, 3), "choose_rows": (2, 5)}
LEAF = {"add_norm": "x", "choose_rows": "hidden"}  # whose gradient is checked


class Backward(Problem):
    """Its arguments are the operator's and `grad`, of the result; what is checked is one gradient."""

    def __post_init__(self) -> None:
        spec, kwargs = SPECS[self.operator], {name: x for name, x in self.kwargs.items() if name != "grad"}
        with torch.enable_grad():
            self.truth, self.yardstick = (
                (spec.oracle_gradients(kwargs, self.kwargs["grad"], dtype)[LEAF[self.operator]],)
                for dtype in (torch.float64, DTYPE)
            )


@functools.lru_cache(maxsize=1)
def problem(operator: str, workload: Workload, backward: bool) -> Problem:
    source = cases.Source(DTYPE, DEVICE)
    kwargs = getattr(cases, operator)(source, workload.lengths, width=WIDTH)
    tokens = sum(workload.lengths)
    if backward:
        kwargs["grad"] = source.normal(tokens, WIDTH)
    return (Backward if backward else Problem)(
        operator=operator,
        workload=str(workload),
        variant="backward" if backward else "forward",
        state="full" if workload.layer is None else "skimmed",
        kwargs=kwargs,
        tokens=tokens,
        capacity=tokens,
        moved=tokens * PASSES[operator][backward] * WIDTH * DTYPE.itemsize,
        flops=0,
    )


def backward_of(operator: str, name: str) -> Contender:
    """The backward operator itself: what autograd does around it belongs to no kernel."""
    back = f"{operator}_backward"

    def prepare(kwargs: Kwargs) -> Call:
        run = OPERATORS[back].overload(name)
        grad, *operands = kwargs["grad"], *(x for key, x in kwargs.items() if key != "grad")
        saved: tuple[Any, ...] = (*operands, True)
        if operator == "add_norm":
            _, total, statistics = OPERATORS[operator].overload(name)(*operands, 1e-12)
            saved = (total, statistics, kwargs["weight"])
        return lambda: run(grad, *saved)

    def valid(problem: Problem, result: tuple[Tensor, ...]) -> Tensor:
        return result[0 if operator == "add_norm" else 1]

    return Contender(name, prepare, valid, ours=name in OURS, reason=why_not(OPERATORS[back], name))


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", dict.fromkeys([*OURS, "reference"]))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("workload", ROW_WORKLOADS, ids=str)
@pytest.mark.parametrize("operator", PASSES)
def test_training_rows(
    benchmark: BenchmarkFixture, operator: str, workload: Workload, backward: bool, name: str, ceilings: Ceilings
) -> None:
    contender = backward_of(operator, name) if backward else backend(operator, name)
    contender.ours = name in OURS
    measure(benchmark, problem(operator, workload, backward), contender, ceilings)
