"""LayerNorm with the row gather, then oneDNN, then LayerNorm -> GELU -> dot in one pass over the product."""

from __future__ import annotations

import torch
from torch import Tensor

from ...library import implement, needs_library
from ...onednn import linear, multiplied_rows


@implement("skim_logit", "cpu", available=needs_library("cpu"))
def skim_logit(
    hidden: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    eps: float,
) -> Tensor:
    native = torch.ops.transkimmer_cpu
    x = native.layer_norm_rows(hidden, slots, cu_seqlens, norm1_weight, norm1_bias, eps)  # [capacity, d]
    x = linear(x, fc_weight, fc_bias, "none", multiplied_rows(cu_seqlens, x.size(0)))  # [capacity, m]
    return native.layer_norm_gelu_dot(x, cu_seqlens, norm2_weight, norm2_bias, eps, out_weight, out_bias)
