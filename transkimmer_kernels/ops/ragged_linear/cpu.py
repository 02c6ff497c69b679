"""oneDNN on packed weights, bias and GELU in its epilogue; residual + LayerNorm + scatter in one native pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ...library import implement, needs_library
from ...onednn import linear, multiplied_rows


@implement("ragged_linear", "cpu", available=needs_library("cpu"))
def ragged_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, slots: Tensor | None, activation: str
) -> Tensor:
    if slots is not None:
        x = torch.ops.transkimmer.gather_rows.cpu(x, slots, cu_seqlens)
    return linear(x, weight, bias, activation, multiplied_rows(cu_seqlens, x.size(0)))


@implement("ragged_linear_norm", "cpu", available=needs_library("cpu"))
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
    y = linear(x, weight, bias, "none", multiplied_rows(cu_seqlens, x.size(0)))
    torch.ops.transkimmer_cpu.add_layer_norm_(
        y, None, y, residual, residual_slots, norm_weight, norm_bias, eps, cu_seqlens
    )
    return y


@implement("ragged_linear_norm_", "cpu", available=needs_library("cpu"))
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
    y = linear(x, weight, bias, "none", multiplied_rows(cu_seqlens, x.size(0)))
    torch.ops.transkimmer_cpu.add_layer_norm_(hidden, slots, y, residual, None, norm_weight, norm_bias, eps, cu_seqlens)
