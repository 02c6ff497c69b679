"""`skim_tokens`: the skim predictor's decisions carried out, from hidden states to the shorter list."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...library import define
from ...registry import select
from ..counting import row_count, sequence_count
from ..skim_logit import WEIGHTS, check_predictor, predictor_flops


def _fake(hidden: Tensor, slots: Tensor, cu_seqlens: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(slots), torch.empty_like(cu_seqlens)


def _flops(hidden: Tensor, slots: Tensor, cu_seqlens: Tensor, *rest: Any) -> int:
    """First tokens that stay anyway need no score, whether or not a backend computes one."""
    weights, keep_first = dict(zip(WEIGHTS, rest, strict=False)), rest[-1]
    rows = row_count(cu_seqlens, slots.numel()) - (sequence_count(cu_seqlens) if keep_first else 0)
    return predictor_flops(rows, weights["fc_weight"], weights["out_weight"])


define(
    "skim_tokens",
    "(Tensor hidden, Tensor slots, Tensor cu_seqlens, "
    + ", ".join(f"Tensor {name}" for name in WEIGHTS)
    + ", float eps, float logit_threshold, bool keep_first) -> (Tensor, Tensor)",
    fake=_fake,
    flops=_flops,
)


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
    *,
    logit_threshold: float = 0.0,
    keep_first: bool = True,
    eps: float = 1e-5,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`compact` of the tokens whose `skim_logit` is not below `logit_threshold` (Transkimmer, Eq. 2 and Sec. 3.2).

    A token whose logit is NaN stays, so that a broken state shows in the output instead of vanishing.

    Args:
        hidden, slots, cu_seqlens and the predictor's weights: as in `skim_logit`.
        logit_threshold: log(t / (1 - t)) for a threshold t on the keep probability.
        keep_first: keep the first token of every non-empty sequence whatever its logit is.
        eps: of both LayerNorms.
        kernels: backend, see `registry`.

    Returns:
        `(slots, cu_seqlens)` of the survivors, as `compact` returns them. Not differentiable.
    """
    weights = (norm1_weight, norm1_bias, fc_weight, fc_bias, norm2_weight, norm2_bias, out_weight, out_bias)
    check_predictor("skim_tokens", kernels, hidden, slots, cu_seqlens, weights)
    run = select("skim_tokens", kernels, hidden.device, hidden.dtype)
    lists = slots.contiguous(), cu_seqlens.contiguous()
    return run(hidden.contiguous(), *lists, *weights, eps, logit_threshold, keep_first)
