"""`skim_tokens` in Triton: `skim_logit`'s kernels, told to write decisions instead of logits, then `compact`'s.

Between the two lies 1 byte per position, and no operator of PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ... import triton_support
from ...library import implement
from ...triton_support import Specialisation
from ..compact.triton import compact
from ..skim_logit.triton import score_tokens


@implement("skim_tokens", "triton", available=triton_support.why_not)
def skim_tokens(hidden: Tensor, slots: Tensor, cu_seqlens: Tensor, *weights_and_options: Any) -> tuple[Tensor, Tensor]:
    *predictor, eps, logit_threshold, keep_first = weights_and_options
    keep = score_tokens(hidden, slots, cu_seqlens, predictor, eps, logit_threshold)
    return compact(keep, slots, cu_seqlens, keep_first)


def specialisations() -> Iterator[Specialisation]:
    """None of its own: those of `skim_logit` (deciding ones among them) and `compact`."""
    yield from ()
