"""`encoder_layer_` from the Triton kernels of the single operators.

Seven launches, of which each reads the token count on the device: no host work stands between them that a captured
CUDA graph would not leave out, and no kernel spans the grid-wide dependencies between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ... import triton_support
from ...library import implement
from ...registry import kernel_set
from ...triton_support import Specialisation
from .compose import compose_layer_


@implement("encoder_layer_", "triton", available=triton_support.why_not)
def encoder_layer_(hidden: Tensor, *arguments: Any) -> None:
    compose_layer_(kernel_set("triton", hidden.device.type, hidden.dtype), hidden, *arguments)


def specialisations() -> Iterator[Specialisation]:
    """None: the operators that it calls list their own kernels."""
    return iter(())
