"""The rivals of `ragged_linear`'s own product behind its contract, and every configuration that may be measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from transkimmer_kernels import triton_support, tuning

if (REASON := triton_support.why_not_importable()) is not None:
    pytest.skip(REASON, allow_module_level=True)

from transkimmer_kernels.ops.ragged_linear import strategies, tiling
from transkimmer_kernels.tune.problems import PROBLEMS, tunables
from transkimmer_kernels.tune.search import search

from ..target import FLOATS, TARGETS, Target
from . import oracle
from .cases import Case
from .closeness import assert_close_as_torch
from .operators import CASES, MOST, SPECS, clone

TRITON = [target for target in TARGETS if target.backend == "triton"]
PRODUCTS = ("ragged_linear", "ragged_linear_norm", "ragged_linear_norm_")
on_triton = pytest.mark.parametrize("target", TRITON, ids=str)


def _usable(strategy: str, case: Case, dtype: torch.dtype) -> bool:
    sizes = case.options["out"], case.options["width"]
    return strategies.usable(strategy, dtype, *sizes)


LIBRARY = [
    pytest.param(target, strategy, case, dtype, id=f"{target}-{strategy}-{case}-{str(dtype).removeprefix('torch.')}")
    for target in TRITON
    for strategy in ("grouped_mm", "capacity")
    for case in CASES
    for dtype in FLOATS
    if case.operator in PRODUCTS and case.lengths in MOST and _usable(strategy, case, dtype)
]


@pytest.mark.parametrize(("target", "strategy", "case", "dtype"), LIBRARY)
def test_a_librarys_product_keeps_the_contract(
    target: Target, strategy: str, case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Poison and all: rows beyond the count may be anything, and reach no other row."""
    target.require(case.operator)
    ran: list[str] = []
    original = strategies.product

    def product(strategy: str, *arguments: Any) -> Any:
        ran.append(strategy)
        return original(strategy, *arguments)

    monkeypatch.setattr(strategies, "product", product)
    spec, kwargs = SPECS[case.operator], case.make(dtype, target.device)
    config = tiling.default(dtype, 1, 1)._replace(strategy=strategy)
    with tuning.forced("ragged_linear", config):
        actual = oracle.valid(spec.name, kwargs, target.call(spec.function, **clone(kwargs)))
    assert ran == [strategy]
    for ours, exact, plain in zip(actual, spec.oracle(kwargs, torch.float64), spec.oracle(kwargs, dtype), strict=True):
        assert_close_as_torch(ours, exact, plain)


@pytest.mark.parametrize(
    ("strategy", "dtype", "sizes", "expected"),
    [
        ("triton", torch.bfloat16, (768, 768), False),
        ("grouped_mm", torch.bfloat16, (768, 768), True),
        ("grouped_mm", torch.bfloat16, (768, 312), True),
        ("grouped_mm", torch.bfloat16, (99, 32), False),
        ("grouped_mm", torch.bfloat16, (96, 33), False),
        ("grouped_mm", torch.float16, (768, 768), False),
        ("grouped_mm", torch.float32, (768, 768), False),
        ("capacity", torch.float32, (99, 33), True),
    ],
)
def test_a_strategy_that_would_read_the_count_is_not_used(
    strategy: str, dtype: torch.dtype, sizes: tuple[int, int], expected: bool
) -> None:
    assert strategies.usable(strategy, dtype, *sizes) is expected


@on_triton
def test_a_strategy_that_cannot_be_used_leaves_our_own_product(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    target.require("ragged_linear")
    monkeypatch.setattr(strategies, "product", lambda *_: pytest.fail("a library's product ran"))
    case = next(case for case in CASES if case.operator == "ragged_linear" and case.lengths == "awkward")
    kwargs = case.make(torch.float32, target.device)
    config = tiling.default(torch.float32, 1, 1)._replace(strategy="grouped_mm")
    with tuning.forced("ragged_linear", config):
        target.call(SPECS["ragged_linear"].function, **kwargs)


@pytest.mark.slow
@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("operator", "sizes"), [("ragged_linear", (96, 32)), ("skim_logit", (32, 130)), ("ragged_attention", (128,))]
)
def test_every_candidate_computes_the_same(
    target: Target, operator: str, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    """What a device's table may name, except for whether a device can compile it."""
    target.require(operator)
    assert operator in tunables()
    capacity, count = (130, 50) if operator == "ragged_attention" else (70, 67)
    call = PROBLEMS[operator].make(dtype, sizes, (capacity, count), torch.device(target.device))
    found = search(tunables()[operator], dtype, sizes, [call], lambda run: 1.0)
    assert not found.dropped or target.device == "cuda"
    assert found.tried > 3
