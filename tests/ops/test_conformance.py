"""Every operator x backend x dtype x awkward case against an fp64 oracle, forwards and backwards.

A new backend is tested by standing in `transkimmer_kernels.library.BACKENDS`; a new operator by a line in
`operators.SPECS` and its cases. What must not be read is NaN in the inputs, and what is not written is NaN in the
outputs (`cases.py`, `target.poisoned_allocations`).
"""

from __future__ import annotations

import pytest
import torch

from transkimmer_kernels.library import OPERATORS
from transkimmer_kernels.registry import why_not

from ..target import DTYPES, TARGETS, Target, poisoned_allocations
from . import oracle
from .cases import Case
from .closeness import FORWARD, GRADIENT, assert_close_as_torch
from .operators import CASES, SPECS, clone

# Batches on which an interpreted attention kernel takes up to half a minute.
LARGE = ("many-short", "long", "past-a-tile")


def dtypes(target: Target, case: Case) -> tuple[torch.dtype, ...]:
    """All that the backend has; large batches in the interpreter in fp32 alone, the others are for rounding there."""
    every = DTYPES[target.backend]
    interpreted = target.backend == "triton" and target.device == "cpu"
    if case.operator == "compact" or (interpreted and case.operator == "ragged_attention" and case.lengths in LARGE):
        return every[:1]
    return every


COMBINATIONS = [
    pytest.param(target, case, dtype, id=f"{target}-{case}-{str(dtype).removeprefix('torch.')}")
    for target in TARGETS
    for case in CASES
    if case.backends is None or target.backend in case.backends
    for dtype in dtypes(target, case)
]
DIFFERENTIABLE = [parameter for parameter in COMBINATIONS if SPECS[parameter.values[1].operator].leaves]


# Outputs that are fp32 for inputs of 16 bits.
FP32 = {"skim_logit": ("out",), "ragged_attention": ("lse", "importance")}


@pytest.mark.parametrize(("target", "case", "dtype"), COMBINATIONS)
def test_forward(target: Target, case: Case, dtype: torch.dtype) -> None:
    target.require(case.operator)
    spec = SPECS[case.operator]
    kwargs = case.make(dtype, target.device)
    actual = oracle.valid(spec.name, kwargs, target.call(spec.function, **clone(kwargs)))
    truth, yardstick = spec.oracle(kwargs, torch.float64), spec.oracle(kwargs, dtype)
    terms = spec.terms(kwargs, actual[0]) if kwargs.get("return_importance") else {}
    for name, ours, exact, plain in zip(spec.outputs, actual, truth, yardstick, strict=True):
        if spec.exact:
            assert torch.equal(ours, plain)
            assert ours.dtype == plain.dtype
        else:
            assert ours.dtype == (torch.float32 if name in FP32.get(spec.name, ()) else dtype)
            assert_close_as_torch(ours, exact, plain, FORWARD, name, terms.get(name))


@pytest.mark.parametrize(("target", "case", "dtype"), DIFFERENTIABLE)
def test_backward(target: Target, case: Case, dtype: torch.dtype) -> None:
    spec = SPECS[case.operator]
    target.require(case.operator, *spec.backward)
    kwargs = case.make(dtype, target.device)
    names = spec.present_leaves(kwargs)
    kwargs.update({name: kwargs[name].detach().requires_grad_() for name in names})

    with target.only(spec.name, *spec.backward):
        outputs = spec.function(**kwargs, kernels=target.backend)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        # The upstream gradient of an undefined row is as undefined as the row.
        upstream = torch.full_like(first, torch.nan)
        count = oracle.valid(spec.name, kwargs, outputs)[0].size(0)
        upstream[:count] = torch.randn_like(first[:count])
        actual = torch.autograd.grad(first, [kwargs[name] for name in names], upstream)

    upstream = upstream[:count]
    truth, yardstick = (spec.oracle_gradients(kwargs, upstream, d) for d in (torch.float64, dtype))
    terms = spec.terms(kwargs, upstream)
    for name, ours in zip(names, actual, strict=True):
        assert ours.dtype == kwargs[name].dtype
        if spec.exact:
            assert torch.equal(ours, yardstick[name])
        else:
            assert_close_as_torch(ours, truth[name], yardstick[name], GRADIENT, f"gradient of {name}", terms.get(name))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_nobody_wrote_is_seen(device: str) -> None:
    """The other tests rest on it, in PyTorch's allocations and in those of native code."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    with poisoned_allocations(device):
        assert torch.empty(3, device=device).isnan().all()
        if (reason := why_not(OPERATORS["compact"], device)) is not None:
            pytest.skip(reason)
        keep = torch.zeros(4, dtype=torch.bool, device=device)
        slots, offsets = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1, 2, 3], [0, 4]))
        slots, _ = OPERATORS["compact"].overload(device)(keep, slots, offsets, False)
        assert (slots[1:] == torch.iinfo(torch.int32).max).all()  # the first place is written and does not count
