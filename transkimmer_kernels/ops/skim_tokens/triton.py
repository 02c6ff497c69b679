"""`skim_tokens` in Triton: `skim_logit`'s kernels, told to write decisions instead of logits, then `compact`'s.

Between the two lies 1 byte per position, and no operator of PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ... import triton_support
from ...library import implement
from ...triton_support import Specialisation
from ..compact.triton import compact
from ..skim_logit.triton import score_tokens


@implement("skim_tokens", "triton", available=triton_support.why_not)
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
    keep = score_tokens(hidden, slots, cu_seqlens, weights, eps, logit_threshold)
    return compact(keep, slots, cu_seqlens, keep_first)


def specialisations() -> Iterator[Specialisation]:
    """None of its own: those of `skim_logit` (deciding ones among them) and `compact`."""
    yield from ()
