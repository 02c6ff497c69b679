from __future__ import annotations

from torch import Tensor

from ...library import implement
from ..compact.reference import compact
from ..skim_logit.reference import skim_logit


@implement("skim_tokens", "reference")
def skim_tokens(
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
    logit_threshold: float,
    keep_first: bool,
) -> tuple[Tensor, Tensor]:
    weights = (norm1_weight, norm1_bias, fc_weight, fc_bias, norm2_weight, norm2_bias, out_weight, out_bias)
    logit = skim_logit(hidden, slots, cu_seqlens, *weights, eps)
    return compact(~(logit < logit_threshold), slots, cu_seqlens, keep_first)
