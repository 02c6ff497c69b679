"""`add_norm` on operands of different dtypes, as under autocast, and beside PyTorch's own LayerNorm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import transkimmer_kernels as tk

from ..target import Target

pytestmark = pytest.mark.operators("add_norm", "add_norm_backward")


@pytest.mark.parametrize("alone", [False, True], ids=["residual", "alone"])
def test_the_result_has_the_widest_dtype(target: Target, alone: bool) -> None:
    """A product in bf16, states and parameters in fp32: every gradient has the dtype of its operand."""
    generator = torch.Generator().manual_seed(0)
    x, residual, weight, bias, grad = (
        torch.randn(shape, generator=generator).to(target.device) for shape in ((9, 48), (9, 48), 48, 48, (9, 48))
    )
    operands = {"x": x.bfloat16(), "residual": None if alone else residual, "weight": weight, "bias": bias}
    leaves = [x.detach().requires_grad_() for x in operands.values() if x is not None]
    given = dict(zip((name for name, x in operands.items() if x is not None), leaves, strict=True))
    with target.only("add_norm", "add_norm_backward"):
        y = tk.add_norm(**{"residual": None, **given}, kernels=target.backend)
        found = torch.autograd.grad(y, leaves, grad)
    total = given["x"] + given["residual"] if not alone else given["x"].float()
    expected = F.layer_norm(total, (48,), given["weight"], given["bias"], 1e-12)
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for actual, wanted, leaf in zip(found, torch.autograd.grad(expected, leaves, grad), leaves, strict=True):
        assert actual.dtype == wanted.dtype == leaf.dtype
        torch.testing.assert_close(actual, wanted, rtol=1e-2 if leaf.dtype == torch.bfloat16 else 1e-4, atol=1e-3)


@pytest.mark.parametrize("alone", [False, True], ids=["residual", "alone"])
def test_parameters_do_not_narrow_the_sum(target: Target, alone: bool) -> None:
    """A residual in fp32 keeps it in fp32, whatever the other operands are."""
    x, weight, bias = (torch.randn(*shape, device=target.device).bfloat16() for shape in ((9, 48), (48,), (48,)))
    residual = None if alone else torch.randn(9, 48, device=target.device)
    y = target.call(tk.add_norm, x=x, residual=residual, weight=weight, bias=bias)
    assert y.dtype == (torch.bfloat16 if alone else torch.float32)
    total = x.float() if residual is None else x + residual
    expected = F.layer_norm(total, (48,), weight.float(), bias.float(), 1e-12)
    torch.testing.assert_close(y, expected.to(y.dtype), rtol=2e-2 if alone else 1e-4, atol=1e-2 if alone else 1e-4)


def test_a_sum_is_rounded_before_it_is_normalised(target: Target) -> None:
    """As by PyTorch: the states that a layer leaves and those that it normalises are the same."""
    x = torch.full((1, 32), 256.0, device=target.device).bfloat16()
    residual = torch.linspace(0, 0.9, 32, device=target.device).bfloat16()[None]  # lost beside 256
    weight, bias = torch.ones(32, device=target.device).bfloat16(), torch.zeros(32, device=target.device).bfloat16()
    y = target.call(tk.add_norm, x=x, residual=residual, weight=weight, bias=bias, eps=1e-5)
    assert torch.equal(y, F.layer_norm(x + residual, (32,), weight, bias, 1e-5))
