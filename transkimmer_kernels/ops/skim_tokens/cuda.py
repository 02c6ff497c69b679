"""`skim_tokens` on CUDA: `skim_logit`'s kernel, told to write decisions, then `compact`'s; Triton's where that is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...library import OPERATORS, implement, needs_kernel
from ..skim_logit.cuda import BEYOND, fits


@implement("skim_tokens", "cuda", available=needs_kernel("transkimmer_cuda::skim_tokens", "skim_tokens", BEYOND))
def skim_tokens(hidden: Tensor, slots: Tensor, cu_seqlens: Tensor, *weights_and_options: Any) -> tuple[Tensor, Tensor]:
    chosen = torch.ops.transkimmer_cuda.skim_tokens
    run = chosen if fits(hidden, weights_and_options[:-3]) else OPERATORS["skim_tokens"].overload("triton")
    return run(hidden, slots, cu_seqlens.contiguous(), *weights_and_options)
