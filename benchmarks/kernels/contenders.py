"""Who is timed on which problem, and the one way in which everybody is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from tests.ops import oracle
from tests.ops.closeness import assert_close_as_torch
from tests.ops.operators import SPECS
from transkimmer_kernels.library import OPERATORS
from transkimmer_kernels.registry import why_not

from .roofline import Ceilings
from .sizes import DTYPE, ON_GPU
from .timing import Call, Kwargs, copies, run

# Backends of ours that have a chance on this device.
OURS = ("triton", "cuda") if ON_GPU else ("reference", "triton")


@dataclass
class Problem:
    """One operator on one workload.

    Args:
        operator: its name; kwargs: of its public function, as the conformance tests make them.
        workload, variant: name the problem in the results; state: "full" or "skimmed".
        tokens, capacity: rows that count, and rows there are.
        moved, flops: the fewest bytes to read and write, and the operations of the matrix products.
    """

    operator: str
    workload: str
    variant: str
    state: str
    kwargs: Kwargs
    tokens: int
    capacity: int
    moved: int
    flops: int

    def __post_init__(self) -> None:
        spec = SPECS[self.operator]
        # On the host where values are moved one by one, on the device where they are multiplied.
        kwargs = _to("cpu", self.kwargs) if spec.exact else self.kwargs
        self.truth, self.yardstick = (spec.oracle(kwargs, dtype) for dtype in (torch.float64, DTYPE))

    def check(self, actual: Tensor | tuple[Tensor, ...]) -> None:
        """AssertionError unless the valid part of the result is as close to the oracle as plain PyTorch's."""
        if SPECS[self.operator].exact:
            for ours, exact in zip(actual, self.truth, strict=True):
                assert torch.equal(ours.cpu(), exact)
        else:
            assert isinstance(actual, Tensor)
            assert_close_as_torch(actual, self.truth[0], self.yardstick[0])


def _to(device: str, kwargs: Kwargs) -> Kwargs:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in kwargs.items()}


@dataclass
class Contender:
    """prepare: arguments -> the call that is timed (what it does before returning is not); valid: (problem, result) ->
    the part of the result to check; reason: why it cannot take part here."""

    name: str
    prepare: Callable[[Kwargs], Call]
    valid: Callable[[Problem, Any], Any]
    ours: bool = False
    reason: str | None = None


def backend(operator: str, name: str) -> Contender:
    """One of our backends, by the public function; its checks are host work, and count in `host_us` only."""

    def prepare(kwargs: Kwargs) -> Call:
        public = SPECS[operator].function
        return lambda: public(**kwargs, kernels=name)

    def valid(problem: Problem, result: Any) -> Any:
        outputs = oracle.valid(operator, problem.kwargs, result)
        return outputs if SPECS[operator].exact else outputs[0]

    return Contender(name, prepare, valid, ours=True, reason=why_not(OPERATORS[operator], name))


def first_rows(problem: Problem, result: Tensor) -> Tensor:
    return result[: problem.tokens]


def measure(benchmark: BenchmarkFixture, problem: Problem, contender: Contender, ceilings: Ceilings) -> None:
    """Checks one contender's result and times it; a rival that gives a wrong one is skipped, one of ours fails."""
    if contender.reason is not None:
        pytest.skip(f"{contender.name}: {contender.reason}")
    calls = [contender.prepare(kwargs) for kwargs in copies(problem.kwargs, problem.moved)]
    try:
        problem.check(contender.valid(problem, calls[0]()))
    except (AssertionError, RuntimeError, ValueError) as error:
        if contender.ours:
            raise
        pytest.skip(f"{contender.name} is not timed: {type(error).__name__}: {str(error).splitlines()[0]}")
    benchmark.group = f"{problem.operator} {problem.variant} {problem.workload}"
    facts = {
        "operator": problem.operator,
        "variant": problem.variant,
        "workload": problem.workload,
        "state": problem.state,
        "contender": contender.name,
        "ours": contender.ours,
        "dtype": str(DTYPE).removeprefix("torch."),
        "tokens": problem.tokens,
        "capacity": problem.capacity,
        "bytes": problem.moved,
        "flops": problem.flops,
        "bound_us": ceilings.bound_us(problem.moved, problem.flops),
    }
    run(benchmark, calls, facts, ours=contender.ours)
