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


def _check_forced(target: Target, case: Case, dtype: torch.dtype, operator: str, config: Any) -> None:
    spec, kwargs = SPECS[case.operator], case.make(dtype, target.device)
    with tuning.forced(operator, config):
        actual = oracle.valid(spec.name, kwargs, target.call(spec.function, **clone(kwargs)))
    for ours, exact, plain in zip(actual, spec.oracle(kwargs, torch.float64), spec.oracle(kwargs, dtype), strict=True):
        assert_close_as_torch(ours, exact, plain)


def _awkward(*operators: str) -> list[Case]:
    return [case for case in CASES if case.operator in operators and case.lengths == "awkward"]


@on_triton
@pytest.mark.parametrize("most", [0, 8, 1024], ids="split up to {}".format)
@pytest.mark.parametrize("case", _awkward("ragged_linear_norm", "ragged_linear_norm_"), ids=str)
def test_few_rows_and_many(target: Target, case: Case, most: int) -> None:
    """The awkward batch has more than 8 rows: split products, whole ones because of the count, and whole ones only."""
    target.require(case.operator)
    config = tiling.default(torch.bfloat16, 1, 2)._replace(few=(64, 64, 16), split=2, most_split=most)
    _check_forced(target, case, torch.bfloat16, "ragged_linear", config)


@on_triton
@pytest.mark.parametrize("form", ["fused", "steps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", _awkward("skim_logit"), ids=str)
def test_either_form_of_the_predictor(target: Target, case: Case, dtype: torch.dtype, form: str) -> None:
    target.require(case.operator)
    sizes = case.options["width"], case.options["inner"]
    config = tunables()["skim_logit"].default(dtype, *sizes)._replace(form=form)
    _check_forced(target, case, dtype, "skim_logit", config)


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
