"""The tolerance rule itself: what it lets pass, and what it does not."""

from __future__ import annotations

import pytest
import torch

from .closeness import FORWARD, assert_close_as_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_times_pytorchs_error_is_too_much(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(96, 768).to(dtype) for _ in range(2))
    oracle, plain = x.double() @ weight.double().T, x @ weight.T
    error = plain.double() - oracle
    assert_close_as_torch(oracle + FORWARD * error, oracle, plain)
    with pytest.raises(AssertionError, match="max error"):
        assert_close_as_torch(oracle + 2 * FORWARD * error, oracle, plain)


def test_what_is_exact_may_be_rounded_once() -> None:
    oracle = torch.full((4,), 1.0, dtype=torch.float64)
    exact, unit = oracle.bfloat16(), torch.finfo(torch.bfloat16).eps
    assert_close_as_torch(oracle + 0.5 * unit, oracle, exact)
    for wrong in (oracle + 0.6 * unit, oracle * torch.nan):
        with pytest.raises(AssertionError, match="error"):
            assert_close_as_torch(wrong, oracle, exact)
