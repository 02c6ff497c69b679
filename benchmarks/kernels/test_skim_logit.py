"""`skim_logit` against the same network in plain PyTorch on the exact rows, eager and compiled."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from tests.ops import cases
from tests.ops.operators import PREDICTOR

from .contenders import OURS, Contender, Problem, backend, first_rows, measure
from .roofline import Ceilings, size
from .sizes import DEVICE, DTYPE, ON_GPU, ROW_WORKLOADS, WIDTH, Workload
from .timing import Call, Kwargs, clock


@functools.lru_cache(maxsize=1)
def problem(workload: Workload) -> Problem:
    source = cases.Source(DTYPE, DEVICE, spare=workload.spare, unlisted=workload.spare)
    kwargs = cases.skim_logit(source, workload.lengths, width=WIDTH, inner=WIDTH)
    tokens = sum(workload.lengths)
    return Problem(
        operator="skim_logit",
        workload=str(workload),
        variant="forward",
        state="full" if workload.layer is None else "skimmed",
        kwargs=kwargs,
        tokens=tokens,
        capacity=tokens + workload.spare,
        moved=size(kwargs[name] for name in PREDICTOR) + tokens * (WIDTH * DTYPE.itemsize + 4 + 4),
        flops=2 * tokens * WIDTH * (WIDTH + 1),
    )


def plain(hidden: Tensor, rows: Tensor, w: dict[str, Tensor]) -> Tensor:
    x = hidden.index_select(0, rows)
    x = F.layer_norm(x, x.shape[1:], w["norm1_weight"], w["norm1_bias"], 1e-5)
    x = F.linear(x, w["fc_weight"], w["fc_bias"])
    x = F.gelu(F.layer_norm(x, x.shape[1:], w["norm2_weight"], w["norm2_bias"], 1e-5))
    return F.linear(x, w["out_weight"][None], w["out_bias"]).squeeze(1)


# Inductor on the device; on a CPU nothing is timed, and its compiler is not what is tried.
compiled = torch.compile(plain, dynamic=False, backend="inductor" if ON_GPU else "eager")
RIVALS = {"eager": plain, "compiled": compiled}


def contender(name: str, of: Problem) -> Contender:
    if name in OURS:
        return backend("skim_logit", name)

    def prepare(kwargs: Kwargs) -> Call:
        hidden, rows, weights = kwargs["hidden"], kwargs["slots"][: of.tokens], {n: kwargs[n] for n in PREDICTOR}
        return lambda: RIVALS[name](hidden, rows, weights)

    return Contender(name, prepare, first_rows)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("name", [*OURS, *RIVALS])
@pytest.mark.parametrize("workload", ROW_WORKLOADS, ids=str)
def test_skim_logit(benchmark: BenchmarkFixture, workload: Workload, name: str, ceilings: Ceilings) -> None:
    of = problem(workload)
    measure(benchmark, of, contender(name, of), ceilings)
