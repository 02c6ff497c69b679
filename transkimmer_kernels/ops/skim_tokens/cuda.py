"""`skim_tokens` on CUDA: `skim_logit`'s kernel, told to write decisions, then `compact`'s; Triton's where that is."""

from __future__ import annotations

import torch
from torch import Tensor

from ...library import OPERATORS, implement, needs_kernel
from ..skim_logit.cuda import BEYOND, fits


@implement("skim_tokens", "cuda", available=needs_kernel("transkimmer_cuda::skim_tokens", "skim_tokens", BEYOND))
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
    chosen = torch.ops.transkimmer_cuda.skim_tokens
    run = chosen if fits(hidden, weights) else OPERATORS["skim_tokens"].overload("triton")
    return run(hidden, slots, cu_seqlens.contiguous(), *weights, eps, logit_threshold, keep_first)
