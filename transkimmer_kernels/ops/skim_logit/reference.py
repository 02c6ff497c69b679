from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...library import implement


def skim_logit_rows(
    x: Tensor,
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
    """The predictor on dense rows x [n, d] -> [n]; statistics and the dot product in fp32 (fp64 for fp64 input)."""
    precision = torch.promote_types(x.dtype, torch.float32)
    x = F.layer_norm(x, (x.size(1),), norm1_weight, norm1_bias, eps)
    x = F.linear(x, fc_weight, fc_bias).to(precision)
    x = F.layer_norm(x, (x.size(1),), norm2_weight.to(precision), norm2_bias.to(precision), eps)
    return F.gelu(x) @ out_weight.to(precision) + out_bias.to(precision)


@implement("skim_logit", "reference")
def skim_logit(hidden: Tensor, slots: Tensor, cu_seqlens: Tensor, *weights_and_eps: Any) -> Tensor:
    count = int(cu_seqlens[-1])
    logit = hidden.new_zeros((slots.numel(),), dtype=torch.promote_types(hidden.dtype, torch.float32))
    logit[:count] = skim_logit_rows(hidden[slots[:count].long()], *weights_and_eps)
    return logit
