"""Bad input straight to the native CPU overloads, past the Python checks: an exception, never a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from transkimmer_kernels.library import OPERATORS

from ..target import Target
from . import cases
from .cases import Kwargs, Source
from .operators import SPECS, clone
from .test_bad_input import CASES, LENGTHS, LISTS, OFFSET_BREAKS, OFFSETS

CPU = Target("cpu", "cpu")
Break = Callable[[Tensor], Tensor]

LIST_BREAKS: dict[str, Break] = {
    "negative": lambda slots: slots.index_fill(0, torch.tensor([1]), -1),
    "far-away": lambda slots: slots.index_fill(0, torch.tensor([4]), 2**31 - 1),
    "int64": lambda slots: slots.long(),
    "two-dimensional": lambda slots: slots[None],
    "too-short": lambda slots: slots[:2],
    "strided": lambda slots: slots.repeat_interleave(2)[::2],
}
DENSE_BREAKS: dict[str, Break] = {
    "float64": lambda x: x.double(),
    "two-dimensions-more": lambda x: x[None, None],
    "narrow": lambda x: x[..., :-1],
    "short": lambda x: x[: min(2, x.size(0) - 1)],
    "scalar": lambda x: x.new_zeros(()),
}


def _breaks_of(operator: str, name: str, x: Tensor) -> dict[str, Break]:
    if name in OFFSETS:
        return {how: lambda _, broken=broken: broken for how, (broken, _) in OFFSET_BREAKS.items()}
    if name in LISTS:
        # compact moves slots without looking at them.
        harmless = ("negative", "far-away") if operator == "compact" else ()
        return {how: change for how, change in LIST_BREAKS.items() if how not in harmless}
    if x.dtype == torch.bool:
        return {how: change for how, change in DENSE_BREAKS.items() if how != "narrow"}
    if operator == "scatter_rows":
        return {how: DENSE_BREAKS[how] for how in ("short", "two-dimensions-more", "scalar")}
    return DENSE_BREAKS


def _bad_arguments() -> Iterator[Any]:
    tables = {
        operator: getattr(cases, operator)(Source(torch.float32), LENGTHS, **CASES[operator])
        for operator in CASES
        if operator not in ("gather_rows", "add_norm", "choose_rows")  # PyTorch's
    }
    for operator, kwargs in tables.items():
        for name, x in kwargs.items():
            if isinstance(x, Tensor):
                for how in _breaks_of(operator, name, x):
                    yield pytest.param(operator, name, how, id=f"{operator}-{name}-{how}")


def _raw(operator: str) -> tuple[Any, Kwargs]:
    """The overload of `operator` and good raw arguments by name."""
    kwargs = getattr(cases, operator)(Source(torch.float32), LENGTHS, **CASES[operator])
    with CPU.only(operator) as ran:
        SPECS[operator].function(**clone(kwargs), kernels="cpu")
    overload = OPERATORS[operator].overload("cpu")
    names = [argument.name for argument in overload._schema.arguments]
    return overload, dict(zip(names, ran.arguments(operator), strict=True))


def _refused(overload: Any, arguments: Kwargs) -> None:
    with pytest.raises((RuntimeError, ValueError, IndexError)) as caught:
        overload(**arguments)
    assert str(caught.value).strip()


@pytest.mark.parametrize(("operator", "name", "how"), list(_bad_arguments()))
def test_bad_argument(operator: str, name: str, how: str) -> None:
    CPU.require(operator)
    overload, arguments = _raw(operator)
    change = _breaks_of(operator, name, arguments[name])[how]
    _refused(overload, {**arguments, name: change(arguments[name])})


@pytest.mark.parametrize("name", ["grad_out", "q", "k", "v", "out", "lse", "keep"])
@pytest.mark.parametrize("how", DENSE_BREAKS)
def test_bad_argument_of_attention_backward(name: str, how: str) -> None:
    CPU.require("ragged_attention", "ragged_attention_backward")
    overload, arguments = _raw("ragged_attention")
    out, lse, _ = overload(**arguments)
    arguments = {key: x for key, x in arguments.items() if key != "return_importance"}
    arguments |= {"grad_out": torch.ones_like(out), "out": out, "lse": lse}
    backward = OPERATORS["ragged_attention_backward"].overload("cpu")
    backward(**arguments)
    _refused(backward, {**arguments, name: DENSE_BREAKS[how](arguments[name])})


def test_strided_last_dimension_is_refused() -> None:
    CPU.require("ragged_attention")
    overload, arguments = _raw("ragged_attention")
    q = arguments["q"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match=r"q has stride .* in its last dimension"):
        overload(**{**arguments, "q": q})
