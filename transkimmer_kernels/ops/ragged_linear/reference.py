from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...library import implement


@implement("ragged_linear", "reference")
def ragged_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, slots: Tensor | None, activation: str
) -> Tensor:
    count = int(cu_seqlens[-1])
    rows = x[:count] if slots is None else x[slots[:count].long()]
    product = F.linear(rows, weight, bias)
    y = x.new_zeros((x.size(0) if slots is None else slots.numel(), weight.size(0)))
    y[:count] = F.gelu(product) if activation == "gelu" else product
    return y


@implement("ragged_linear_norm", "reference")
def ragged_linear_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    residual_slots: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    cu_seqlens: Tensor,
) -> Tensor:
    count = int(cu_seqlens[-1])
    picked = residual[:count] if residual_slots is None else residual[residual_slots[:count].long()]
    total = F.linear(x[:count], weight, bias) + picked
    y = x.new_zeros((x.size(0), weight.size(0)))
    y[:count] = F.layer_norm(total, (total.size(1),), norm_weight, norm_bias, eps)
    return y


@implement("ragged_linear_norm_", "reference")
def ragged_linear_norm_(
    hidden: Tensor,
    slots: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    cu_seqlens: Tensor,
) -> None:
    count = int(cu_seqlens[-1])
    rows = ragged_linear_norm(x, weight, bias, residual, None, norm_weight, norm_bias, eps, cu_seqlens)
    hidden[slots[:count].long()] = rows[:count]
