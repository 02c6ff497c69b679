from __future__ import annotations

from typing import Any

from torch import Tensor

from ...library import implement
from ..compact.reference import compact
from ..skim_logit.reference import skim_logit


@implement("skim_tokens", "reference")
def skim_tokens(hidden: Tensor, slots: Tensor, cu_seqlens: Tensor, *weights_and_options: Any) -> tuple[Tensor, Tensor]:
    *predictor, eps, logit_threshold, keep_first = weights_and_options
    logit = skim_logit(hidden, slots, cu_seqlens, *predictor, eps)
    return compact(~(logit < logit_threshold), slots, cu_seqlens, keep_first)
