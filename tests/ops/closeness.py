"""The one tolerance rule: no worse than a small multiple of what plain PyTorch does in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD, GRADIENT = 2.0, 3.0


def assert_close_as_torch(
    actual: Tensor,
    oracle64: Tensor,
    torch_same_dtype: Tensor,
    factor: float = FORWARD,
    name: str = "output",
    terms: Tensor | None = None,
) -> None:
    """Largest and mean error of `actual` against the fp64 `oracle64` are at most `factor` times those of PyTorch.

    Where the oracle is infinite or NaN, `actual` must be the same. PyTorch may hit a value exactly (the softmax of a
    single key, a sum of two numbers), which twice nothing would not allow. So the result may besides be off by

    * a part of the unit in the last place of the coarser of the two dtypes, at the largest value of the tensor (for the
      mean: at the mean value). In 16 bits half of it, what rounding the exact result costs, because kernels compute in
      fp32 and round once; from fp32 on all of it, what another correct order of rounding costs;
    * where `terms` is given, the unit of fp32 times that: the sum of the magnitudes of what an element is summed from.
      An algorithm that subtracts in fp32 what PyTorch happens to cancel exactly cannot do better.
    """
    assert actual.shape == oracle64.shape, f"{name}: shape {list(actual.shape)}, expected {list(oracle64.shape)}"
    finite = oracle64.isfinite()
    same = torch.equal(actual.double()[~finite].nan_to_num(), oracle64[~finite].nan_to_num())
    assert same, f"{name}: wrong where the oracle is infinite or NaN"
    if not finite.any():
        return
    truth = oracle64[finite]
    unit = max(torch.finfo(actual.dtype).eps, torch.finfo(torch_same_dtype.dtype).eps)
    ours, torchs = ((x.double()[finite] - truth).abs() for x in (actual, torch_same_dtype))
    for kind in ("max", "mean"):
        error, yardstick, size = (getattr(x, kind)().item() for x in (ours, torchs, truth.abs()))
        floor = unit * size * (0.5 if unit > torch.finfo(torch.float32).eps else 1.0)
        if terms is not None:
            floor += torch.finfo(torch.float32).eps * getattr(terms[finite], kind)().item()
        assert error <= factor * yardstick + floor, (  # also fails for NaN
            f"{name}: {kind} error {error:.3g} exceeds {factor:g} x PyTorch's {yardstick:.3g} + {floor:.3g}"
            f" ({actual.dtype}, {list(actual.shape)})"
        )
