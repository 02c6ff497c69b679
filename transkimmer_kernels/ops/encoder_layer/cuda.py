"""`encoder_layer_` from the CUDA kernels of the single operators, and Triton's where CUDA has none."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...library import OPERATORS, implement, needs_library
from ...registry import kernel_set, why_not
from .compose import compose_layer_

_PARTS = ("ragged_linear", "ragged_attention", "ragged_linear_norm", "ragged_linear_norm_")


def _available() -> str | None:
    if (reason := needs_library("cuda")()) is not None:
        return reason
    for name in _PARTS:
        reasons = [why_not(OPERATORS[name], backend) for backend in ("cuda", "triton")]
        if None not in reasons:
            return f"{name}: {reasons[-1]}"
    return None


@implement("encoder_layer_", "cuda", available=_available)
def encoder_layer_(hidden: Tensor, *arguments: Any) -> None:
    compose_layer_(kernel_set("cuda", hidden.device.type, hidden.dtype), hidden, *arguments)
