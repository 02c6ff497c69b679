"""Gradients against finite differences in fp64 (`reference`), and the other backends' against those formulas.

`test_conformance.test_backward` compares every backend with autograd through a plain formula; here neither autograd
nor a formula is trusted, only forwards.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import transkimmer_kernels as tk

from ..target import Target
from . import cases, oracle
from .cases import Kwargs, Source
from .operators import CASES, SPECS

LENGTHS = (3, 0, 1, 4)
SMALL = {
    "gather_rows": [{"shape": (3,)}],
    "scatter_rows": [{"shape": (3,)}],
    "skim_logit": [{"width": 5, "inner": 4}],
    "ragged_attention": [
        {"heads": 2, "head_dim": 4},
        {"heads": 1, "head_dim": 4, "key_lengths": (2, 0, 5, 3)},
        {"heads": 1, "head_dim": 4, "keep": "mixed"},
        {"heads": 2, "head_dim": 4, "keep": "ones"},
    ],
    "ragged_linear": [
        {"width": 5, "out": 4, "activation": "gelu"},
        {"width": 5, "out": 4, "gather": False, "bias": False},
    ],
    "ragged_linear_norm": [{"width": 4, "out": 5}, {"width": 4, "out": 5, "gather": False, "bias": False}],
}


@pytest.mark.parametrize(
    ("operator", "options"),
    [(operator, options) for operator, variants in SMALL.items() for options in variants],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_gradcheck(operator: str, options: dict[str, Any]) -> None:
    spec = SPECS[operator]
    kwargs = getattr(cases, operator)(Source(torch.float64), LENGTHS, **options)
    if kwargs.get("keep") is not None:
        # Both differences must be possible: at 0 there is no weight below (see test_keep_gradient_of_skimmed_keys).
        kwargs["keep"] = kwargs["keep"].clamp(min=0.05)
    names = spec.present_leaves(kwargs)
    # Undefined rows stay out of the differences: their NaN would be perturbed like any other number.
    leaves = [kwargs[name].contiguous().requires_grad_() for name in names]
    defined = [leaf.detach().isfinite() for leaf in leaves]

    def run(*values: Tensor) -> Tensor:
        filled = [
            torch.where(mask, value, leaf.detach()) for mask, value, leaf in zip(defined, values, leaves, strict=True)
        ]
        arguments = {**kwargs, **dict(zip(names, filled, strict=True))}
        return oracle.valid(operator, kwargs, spec.function(**arguments, kernels="reference"))[0]

    start = [leaf.detach().nan_to_num(0.0).requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(run, start)


def _keep_gradient(kwargs: Kwargs, loss_weights: Tensor, backend: str) -> Tensor:
    kwargs = {**kwargs, "keep": kwargs["keep"].clone().requires_grad_()}
    out, _, _ = tk.ragged_attention(**kwargs, kernels=backend)
    count = loss_weights.size(0)
    return torch.autograd.grad((out[:count] * loss_weights).sum(), kwargs["keep"])[0]


def _differences(kwargs: Kwargs, loss_weights: Tensor, step: float, sides: tuple[int, ...]) -> Tensor:
    """d loss / d keep from forwards alone: a central difference, or one from above."""

    def loss(keep: Tensor) -> Tensor:
        out, _, _ = tk.ragged_attention(**{**kwargs, "keep": keep}, kernels="reference")
        return (out[: loss_weights.size(0)] * loss_weights).sum()

    keep, slopes = kwargs["keep"], torch.zeros_like(kwargs["keep"])
    for j in range(sum(LENGTHS)):
        bump = torch.zeros_like(keep)
        bump[j] = step
        low, high = (loss(torch.where(bump > 0, keep + side * bump, keep)) for side in sides)
        slopes[j] = (high - low) / (step * (sides[1] - sides[0]))
    return slopes


@pytest.mark.parametrize("keep", ["ones", "mixed", "first"])
def test_keep_gradient_of_kept_and_skimmed_keys(keep: str) -> None:
    """At weight 1 and between by central differences; at weight 0 from above, since no weight is below it."""
    kwargs = cases.ragged_attention(Source(torch.float64), LENGTHS, heads=2, head_dim=4, keep=keep)
    loss_weights = torch.randn(sum(LENGTHS), 2, 4, dtype=torch.float64)
    gradient = _keep_gradient(kwargs, loss_weights, "reference")
    skimmed = kwargs["keep"] == 0
    assert bool(skimmed.any()) == (keep != "ones")
    central = _differences(kwargs, loss_weights, 1e-5, (-1, 1))  # error of the order 1e-10
    one_sided = _differences(kwargs, loss_weights, 1e-7, (0, 1))  # error of the order 1e-7
    kept = ~skimmed & kwargs["keep"].isfinite()
    torch.testing.assert_close(gradient[kept], central[kept], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(gradient[skimmed], one_sided[skimmed], rtol=1e-5, atol=1e-5)
    assert gradient[sum(LENGTHS) :].count_nonzero() == 0


@pytest.mark.operators("ragged_attention", "ragged_attention_backward")
def test_keep_gradient_agrees_with_reference(target: Target) -> None:
    """The fp32 gradient of every backend lies where the fp64 reference's does, for each key by itself."""
    kwargs = cases.ragged_attention(Source(torch.float32, target.device), (17, 1, 65, 40), head_dim=32, keep="mixed")
    loss_weights = torch.randn(123, 2, 32, device=target.device)
    actual = _keep_gradient(kwargs, loss_weights, target.backend)
    exact = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in kwargs.items()}
    expected = _keep_gradient(exact, loss_weights.double(), "reference")
    terms = SPECS["ragged_attention"].terms(kwargs, loss_weights)["keep"]
    unit = torch.finfo(torch.float32).eps
    assert bool(((actual - expected).abs()[:123] <= 2 * unit * terms[:123]).all())
    assert bool((kwargs["keep"][:123] == 0).any())


@pytest.mark.parametrize("operator", ["gather_rows", "skim_logit", "ragged_linear", "ragged_linear_norm"])
def test_gradients_of_no_rows_at_all(target: Target, operator: str) -> None:
    """A list with room in it, over nothing: there is no row that its garbage could point at."""
    spec = SPECS[operator]
    target.require(operator, *spec.backward)
    source = Source(torch.float32, target.device, unlisted=0)
    kwargs = getattr(cases, operator)(source, (0, 0), **SMALL[operator][0])
    names = spec.present_leaves(kwargs)
    kwargs |= {name: kwargs[name].detach().requires_grad_() for name in names}
    y = spec.function(**kwargs, kernels=target.backend)
    assert y.size(0) == source.spare
    for name, grad in zip(names, torch.autograd.grad(y, [kwargs[name] for name in names], y * torch.nan), strict=True):
        assert grad.shape == kwargs[name].shape and grad.count_nonzero() == 0, name


@pytest.mark.operators("ragged_attention")
def test_gradient_of_a_read_out_is_refused(target: Target) -> None:
    for index in (1, 2):
        kwargs = cases.ragged_attention(Source(torch.float32, target.device), (3, 2), importance=True)
        kwargs["q"].requires_grad_()
        outputs = tk.ragged_attention(**kwargs, kernels=target.backend)
        with pytest.raises(RuntimeError, match="gradients flow through `out` only"):
            outputs[index].sum().backward()


@pytest.mark.operators("ragged_linear_norm_")
@pytest.mark.parametrize("leaf", ["hidden", "x", "weight", "residual"])
def test_in_place_operator_refuses_to_be_differentiated(target: Target, leaf: str) -> None:
    kwargs = cases.ragged_linear_norm_(Source(torch.float32, target.device), (3, 2), width=8, out=8)
    kwargs[leaf].requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable"):
        tk.ragged_linear_norm_(**kwargs, kernels=target.backend)
    with torch.no_grad():
        tk.ragged_linear_norm_(**kwargs, kernels=target.backend)


@pytest.mark.parametrize("operator", ["ragged_linear_norm_", "encoder_layer_"])
def test_autograd_sees_what_is_written(target: Target, operator: str) -> None:
    """A product that needs the rows as they were says so, instead of giving a gradient of others."""
    target.require(operator)
    options = {"ragged_linear_norm_": {"width": 8, "out": 8}, "encoder_layer_": {"width": 8, "heads": 1, "ff": 8}}
    kwargs = getattr(cases, operator)(Source(torch.float32, target.device), (3, 2), **options[operator])
    factor = torch.ones(8, device=target.device, requires_grad=True)
    y = kwargs["hidden"] * factor
    SPECS[operator].function(**kwargs, kernels=target.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with torch.inference_mode():
        SPECS[operator].function(**kwargs | {"hidden": kwargs["hidden"].clone()}, kernels=target.backend)


DIFFERENTIABLE = sorted(name for name, spec in SPECS.items() if spec.leaves)


@pytest.mark.parametrize("operator", DIFFERENTIABLE)
def test_a_second_derivative_is_refused(target: Target, operator: str) -> None:
    """A formula that holds only for the first one would give none, or a part of it."""
    target.require(operator)
    spec = SPECS[operator]
    kwargs = next(case for case in CASES if case.operator == operator).make(torch.float32, target.device)
    leaves = [kwargs[name].requires_grad_() for name in spec.present_leaves(kwargs)]
    out = spec.function(**kwargs, kernels=target.backend)
    first = out[0] if isinstance(out, tuple) else out
    for loss in (first.square().sum(), first.sum()):  # of the second only what was saved depends on the leaves
        grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match="are differentiable once"):
            sum(grad.square().sum() for grad in grads if grad is not None).backward()
