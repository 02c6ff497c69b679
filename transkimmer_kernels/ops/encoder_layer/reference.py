from __future__ import annotations

from typing import Any

from torch import Tensor

from ...library import implement
from ...registry import kernel_set
from .compose import compose_layer_


@implement("encoder_layer_", "reference")
def encoder_layer_(hidden: Tensor, *arguments: Any) -> None:
    compose_layer_(kernel_set("reference", hidden.device.type, hidden.dtype), hidden, *arguments)
