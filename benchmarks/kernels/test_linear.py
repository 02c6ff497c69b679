"""`ragged_linear`: the bare product against library products, and what is fused into it against the same unfused.

Library products come in three kinds: of the exact rows, whose number a forward had to read back (`cublas_exact`);
of all rows there is room for (`cublas_capacity`); and `grouped_mm` with one group that ends where the device says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from tests.ops import cases

from .contenders import OURS, Contender, Problem, backend, first_rows, measure
from .roofline import Ceilings, size
from .sizes import DEVICE, DTYPE, FFN, ROW_WORKLOADS, WIDTH, Workload
from .timing import Call, Kwargs, clock

SHAPES = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "ffn_in": (FFN, WIDTH), "ffn_out": (WIDTH, FFN)}


def _problem(operator: str, variant: str, workload: Workload, kwargs: Kwargs, extra_rows: int) -> Problem:
    """`extra_rows`: bytes per token that are moved besides a row in and a row out."""
    out, width = kwargs["weight"].shape
    tokens = sum(workload.lengths)
    vectors = (kwargs.get(name) for name in ("bias", "norm_weight", "norm_bias"))
    return Problem(
        operator=operator,
        workload=str(workload),
        variant=variant,
        state="full" if workload.layer is None else "skimmed",
        kwargs=kwargs,
        tokens=tokens,
        capacity=tokens + workload.spare,
        moved=size([kwargs["weight"], *vectors]) + tokens * ((width + out) * DTYPE.itemsize + extra_rows),
        flops=2 * tokens * out * width,
    )


def _source(workload: Workload) -> cases.Source:
    return cases.Source(DTYPE, DEVICE, spare=workload.spare, unlisted=workload.spare)


@functools.lru_cache(maxsize=1)
def product(workload: Workload, shape: str) -> Problem:
    out, width = SHAPES[shape]
    kwargs = cases.ragged_linear(_source(workload), workload.lengths, width=width, out=out, bias=False, gather=False)
    return _problem("ragged_linear", shape, workload, kwargs, 0)


@functools.lru_cache(maxsize=1)
def fused(workload: Workload, fusion: str) -> Problem:
    source, lengths = _source(workload), workload.lengths
    if fusion == "gather":
        kwargs = cases.ragged_linear(source, lengths, width=WIDTH, out=3 * WIDTH)
        return _problem("ragged_linear", fusion, workload, kwargs, 4)
    if fusion == "gelu":
        kwargs = cases.ragged_linear(source, lengths, width=WIDTH, out=FFN, gather=False, activation="gelu")
        return _problem("ragged_linear", fusion, workload, kwargs, 0)
    kwargs = cases.ragged_linear_norm(source, lengths, width=FFN, out=WIDTH)
    return _problem("ragged_linear_norm", fusion, workload, kwargs, WIDTH * DTYPE.itemsize + 4)


def cublas_exact(problem: Problem) -> Contender:
    def prepare(kwargs: Kwargs) -> Call:
        x, weight = kwargs["x"][: problem.tokens], kwargs["weight"]
        return lambda: F.linear(x, weight)

    return Contender("cublas_exact", prepare, first_rows)


def cublas_capacity(problem: Problem) -> Contender:
    return Contender("cublas_capacity", lambda kwargs: lambda: F.linear(kwargs["x"], kwargs["weight"]), first_rows)


def grouped_mm(problem: Problem) -> Contender:
    def prepare(kwargs: Kwargs) -> Call:
        weight, ends = kwargs["weight"].t().unsqueeze(0), kwargs["cu_seqlens"][-1:]
        return lambda: F.grouped_mm(kwargs["x"], weight, offs=ends)

    return Contender("grouped_mm", prepare, first_rows)


def unfused(name: str) -> Callable[[Problem], Contender]:
    """The same product, and plain PyTorch on the exact rows around it; `name`: whose product."""

    def of(problem: Problem) -> Contender:
        bare = None if name == "cublas" else backend("ragged_linear", name)
        reason = None if bare is None else bare.reason

        def prepare(kwargs: Kwargs) -> Call:
            return lambda: _in_steps(kwargs, problem.tokens, name)

        return Contender(f"unfused_{name}", prepare, first_rows, reason=reason)

    return of


def _in_steps(kwargs: Kwargs, tokens: int, name: str) -> torch.Tensor:
    from transkimmer_kernels import ragged_linear

    x, weight, bias = kwargs["x"], kwargs["weight"], kwargs["bias"]
    x = x[:tokens] if kwargs.get("slots") is None else x.index_select(0, kwargs["slots"][:tokens])
    y = F.linear(x, weight) if name == "cublas" else ragged_linear(x, weight, None, kwargs["cu_seqlens"], kernels=name)
    if bias is not None:
        y = y + bias
    if kwargs.get("activation") == "gelu":
        return F.gelu(y)
    if "norm_weight" in kwargs:
        y = y + kwargs["residual"].index_select(0, kwargs["residual_slots"][:tokens])
        return F.layer_norm(y, y.shape[1:], kwargs["norm_weight"], kwargs["norm_bias"], 1e-12)
    return y


def _ours(name: str) -> Callable[[Problem], Contender]:
    return lambda problem: backend(problem.operator, name)


PRODUCTS = {
    **{name: _ours(name) for name in OURS},
    "cublas_exact": cublas_exact,
    "cublas_capacity": cublas_capacity,
    "grouped_mm": grouped_mm,
}
FUSED = {**{name: _ours(name) for name in OURS}, **{f"unfused_{name}": unfused(name) for name in (*OURS, "cublas")}}


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("workload", ROW_WORKLOADS, ids=str)
def test_product(
    benchmark: BenchmarkFixture, workload: Workload, shape: str, contender: str, ceilings: Ceilings
) -> None:
    of = product(workload, shape)
    measure(benchmark, of, PRODUCTS[contender](of), ceilings)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", FUSED)
@pytest.mark.parametrize("fusion", ["gather", "gelu", "norm"])
@pytest.mark.parametrize("workload", ROW_WORKLOADS, ids=str)
def test_fused(
    benchmark: BenchmarkFixture, workload: Workload, fusion: str, contender: str, ceilings: Ceilings
) -> None:
    of = fused(workload, fusion)
    measure(benchmark, of, FUSED[contender](of), ceilings)
