"""`skim_logit` on CUDA: a C++ kernel for 16-bit states and the widths it is compiled for, Triton's for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...library import OPERATORS, implement, needs_kernel

# As in csrc/include/transkimmer/skim_logit.cuh.
WIDEST, WIDTH_STEP = 1024, 64
INNER_WIDTHS = (192,)
DTYPES = (torch.float16, torch.bfloat16)
BEYOND = f"a predictor other than 16-bit and {' / '.join(map(str, INNER_WIDTHS))} wide"


def fits(hidden: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the C++ kernel serves these states and this predictor, whose weights stand in the operator's order."""
    width, inner = hidden.size(1), weights[3].numel()
    return (
        hidden.dtype in DTYPES
        and 0 < width <= WIDEST
        and width % WIDTH_STEP == 0
        and inner in INNER_WIDTHS
        and all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (hidden, *weights[:-1]))
    )


@implement("skim_logit", "cuda", available=needs_kernel("transkimmer_cuda::skim_logit", "skim_logit", BEYOND))
def skim_logit(hidden: Tensor, slots: Tensor, cu_seqlens: Tensor, *weights_and_eps: Any) -> Tensor:
    chosen = torch.ops.transkimmer_cuda.skim_logit
    run = chosen if fits(hidden, weights_and_eps[:-1]) else OPERATORS["skim_logit"].overload("triton")
    return run(hidden, slots, cu_seqlens.contiguous(), *weights_and_eps)
