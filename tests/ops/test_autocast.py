"""Under autocast an operator computes in the dtype of its operands, as it does without."""

from __future__ import annotations

import pytest
import torch

from ..target import TARGETS, Target
from . import oracle
from .operators import CASES, SPECS, clone


@pytest.mark.parametrize("name", sorted({case.operator for case in CASES}))
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_autocast_changes_nothing(target: Target, name: str) -> None:
    target.require(name)
    case = next(c for c in CASES if c.operator == name and (c.backends is None or target.backend in c.backends))
    kwargs = case.make(torch.float32, target.device)
    with torch.no_grad():
        plain = oracle.valid(name, kwargs, target.call(SPECS[name].function, **clone(kwargs)))
        with torch.autocast(target.device, torch.bfloat16):
            cast = oracle.valid(name, kwargs, target.call(SPECS[name].function, **clone(kwargs)))
    for ours, expected in zip(cast, plain, strict=True):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)
