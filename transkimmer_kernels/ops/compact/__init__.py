"""`compact`: keep mask -> the shorter list of surviving tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ...library import define
from ...registry import select
from ..checks import check_slots, check_tensor


def _fake(keep: Tensor, slots: Tensor, cu_seqlens: Tensor, keep_first: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(slots), torch.empty_like(cu_seqlens)


define("compact", "(Tensor keep, Tensor slots, Tensor cu_seqlens, bool keep_first) -> (Tensor, Tensor)", fake=_fake)


def compact(
    keep: Tensor, slots: Tensor, cu_seqlens: Tensor, *, keep_first: bool = True, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Drops the tokens whose `keep` is false from a ragged list; rows of hidden states do not move.

    Args:
        keep: bool [capacity], by list position; entries at and beyond the token count are ignored.
        slots: int32 [capacity], slot of each token, by sequence then position.
        cu_seqlens: int32 [batch + 1], offsets of the sequences in the list.
        keep_first: keep the first token of every non-empty sequence whatever `keep` says ([CLS] survives).
        kernels: backend, see `registry`.

    Returns:
        `(slots, cu_seqlens)` of the survivors, in the same order, shapes and dtypes as given. Deterministic.

    Raises:
        ValueError, TypeError: a shape, dtype, device, offset or slot is not as above.
    """
    check_tensor("keep", keep, dtype=torch.bool, device=slots.device, shape=(slots.numel(),))
    check_slots("slots", slots, cu_seqlens, torch.iinfo(torch.int32).max)
    run = select("compact", kernels, slots.device)
    return run(keep.contiguous(), slots.contiguous(), cu_seqlens.contiguous(), keep_first)
