from __future__ import annotations

import torch
from torch import Tensor

from ...library import implement
from . import sum_dtype


@implement("add_norm", "reference")
def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = sum_dtype(x, residual)
    total = (x if residual is None else x + residual).contiguous()
    wide = torch.promote_types(dtype, torch.float32)
    y, mean, scale = torch.native_layer_norm(total.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    statistics = torch.stack([mean, scale]).view(2, x.size(0))
    kept = total if residual is not None else x.new_empty((0, x.size(1)))
    return y.to(torch.promote_types(dtype, weight.dtype)), kept, statistics


@implement("add_norm_backward", "reference")
def add_norm_backward(grad: Tensor, total: Tensor, statistics: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = statistics.dtype
    mean, scale = statistics.unsqueeze(2).unbind()
    given = (grad.to(wide), total.to(wide), weight.shape, mean, scale, weight.to(wide))
    bias = torch.empty_like(weight, dtype=wide)  # of which only the shape counts
    grad_total, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(*given, bias, [True] * 3)
    return grad_total.to(total.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
