"""torch.library.opcheck of every overload: schema, fake, autograd registration and the AOT path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from transkimmer_kernels.library import OPERATORS

from ..target import Target
from . import cases
from .cases import Source
from .operators import SPECS, clone

# Per operator, the branches of its schema. Every row of every output is defined (nothing spare, all kept), because
# opcheck compares whole outputs.
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "compact": [{"probability": 1.0, "keep_first": True}],
    "gather_rows": [{"shape": (2, 8)}],
    "scatter_rows": [{"shape": (2, 8)}],
    "skim_logit": [{"width": 32, "inner": 16}],
    "ragged_attention": [{"importance": True}, {"keep": "mixed"}],
    "ragged_linear": [
        {"width": 32, "out": 40, "activation": "gelu"},
        {"width": 32, "out": 40, "gather": False, "bias": False},
    ],
    "ragged_linear_norm": [{"width": 32, "out": 40}, {"width": 32, "out": 40, "gather": False, "bias": False}],
    "ragged_linear_norm_": [{"width": 32, "out": 40}],
    "skim_tokens": [{"width": 32, "inner": 16, "keep_first": True}],
    "encoder_layer_": [
        {"width": 32, "heads": 2, "ff": 40},
        {"width": 32, "heads": 1, "ff": 40, "bias": False, "first_only": True},
    ],
    "embed_tokens": [{"width": 32}, {"width": 32, "positions": None, "types": "unknown"}],
    "add_norm": [{"width": 32}, {"width": 32, "alone": True}],
    "choose_rows": [{"width": 32}],
}
CASES = [(name, options) for name, variants in ARGUMENTS.items() for options in variants]
LENGTHS = (3, 0, 5, 1)
SCHEMA = ("test_schema", "test_faketensor")
AUTOGRAD = ("test_autograd_registration", "test_aot_dispatch_dynamic")


def _arguments(
    operator: str, options: dict[str, Any], target: Target, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Keyword arguments of the public function; every row is defined."""
    source = Source(dtype, target.device)
    make_batch = source.batch
    source.batch = lambda lengths: make_batch(lengths, spare=0, unlisted=2)  # type: ignore[method-assign]
    extra = {"spare": 0} if operator == "ragged_attention" else {}
    kwargs = getattr(cases, operator)(source, LENGTHS, **options, **extra)
    kwargs = {name: _finite(x) if isinstance(x, Tensor) else x for name, x in kwargs.items()}
    for name in SPECS[operator].present_leaves(kwargs):
        kwargs[name] = kwargs[name].detach().requires_grad_()
    return kwargs


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.5) if x.is_floating_point() else x


def test_every_operator_is_checked() -> None:
    assert set(ARGUMENTS) == set(SPECS) == {name for name in OPERATORS if not name.endswith("_backward")}


@pytest.mark.parametrize(("operator", "options"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_overload(target: Target, operator: str, options: dict[str, Any]) -> None:
    target.require(operator)
    kwargs = _arguments(operator, options, target)
    with target.only(operator) as ran:
        SPECS[operator].function(**clone(kwargs), kernels=target.backend)
    raw = ran.arguments(operator)
    utilities = SCHEMA + (AUTOGRAD if SPECS[operator].leaves or operator == "compact" else ())
    if operator == "ragged_attention":  # see test_attention_ahead_of_time
        utilities = utilities[:-1]
    torch.library.opcheck(OPERATORS[operator].overload(target.backend), raw, test_utils=utilities)


@pytest.mark.parametrize(("operator", "options"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_fakes_in_16_bits(target: Target, operator: str, options: dict[str, Any]) -> None:
    """Where some outputs are fp32 and some are not."""
    target.require(operator)
    kwargs = _arguments(operator, options, target, torch.bfloat16)
    with target.only(operator) as ran:
        SPECS[operator].function(**clone(kwargs), kernels=target.backend)
    overload = OPERATORS[operator].overload(target.backend)
    torch.library.opcheck(overload, ran.arguments(operator), test_utils=SCHEMA)


@pytest.mark.parametrize("operator", ["add_norm", "add_norm_backward", "choose_rows", "choose_rows_backward"])
def test_results_are_dense_whatever_the_operands(target: Target, operator: str) -> None:
    target.require(operator)
    x, y, grad = (torch.randn(6, 4, device=target.device).T for _ in range(3))
    weight, bias, keep = (torch.ones(size, device=target.device) for size in (6, 6, 4))
    statistics = torch.ones(2, 4, device=target.device)
    raw = {
        "add_norm": (x, y, weight, bias, 1e-5),
        "add_norm_backward": (grad, x, statistics, weight),
        "choose_rows": (keep, x, y),
        "choose_rows_backward": (grad, keep, x, y, True),
    }[operator]
    overload = OPERATORS[operator].overload(target.backend)
    torch.library.opcheck(overload, raw, test_utils=SCHEMA)
    results = overload(*raw)
    assert all(r.is_contiguous() for r in (results if isinstance(results, tuple) else (results,)))


@pytest.mark.parametrize("options", ARGUMENTS["ragged_attention"], ids=str)
def test_attention_ahead_of_time(target: Target, options: dict[str, Any]) -> None:
    """opcheck differentiates all outputs, which this operator refuses; so its AOT path is checked on `out` alone."""
    target.require("ragged_attention", "ragged_attention_backward")
    kwargs = _arguments("ragged_attention", options, target)
    names = SPECS["ragged_attention"].present_leaves(kwargs)
    with target.only("ragged_attention") as ran:
        SPECS["ragged_attention"].function(**kwargs, kernels=target.backend)
    raw = ran.arguments("ragged_attention")
    overload = OPERATORS["ragged_attention"].overload(target.backend)

    def run(*args: Any) -> Tensor:
        return overload(*args)[0]

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", dynamic=True, fullgraph=True)):
        out = function(*raw)
        grads = torch.autograd.grad(out.square().sum(), [kwargs[name] for name in names])
        results.append((out, *grads))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("options", ARGUMENTS["ragged_attention"], ids=str)
def test_backward_overload(target: Target, options: dict[str, Any]) -> None:
    target.require("ragged_attention", "ragged_attention_backward")
    kwargs = _arguments("ragged_attention", options, target)
    with target.only("ragged_attention", "ragged_attention_backward") as ran:
        out, _, _ = SPECS["ragged_attention"].function(**kwargs, kernels=target.backend)
        out.sum().backward()
    raw = tuple(x.detach() if isinstance(x, Tensor) else x for x in ran.arguments("ragged_attention_backward"))
    overload = OPERATORS["ragged_attention_backward"].overload(target.backend)
    torch.library.opcheck(overload, raw, test_utils=SCHEMA)
