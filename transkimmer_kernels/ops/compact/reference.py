from __future__ import annotations

import torch
from torch import Tensor

from ...library import implement


@implement("compact", "reference")
def compact(keep: Tensor, slots: Tensor, cu_seqlens: Tensor, keep_first: bool) -> tuple[Tensor, Tensor]:
    capacity, batch = slots.numel(), cu_seqlens.numel() - 1
    position = torch.arange(capacity, device=slots.device)  # [capacity]
    keep = keep & (position < cu_seqlens[-1])
    if keep_first and batch:
        start, end = cu_seqlens[:-1], cu_seqlens[1:]
        # An empty sequence has no first token: its start is another sequence's row, or past the end.
        first = torch.zeros(capacity + 1, dtype=torch.bool, device=slots.device)
        first[torch.where(end > start, start, capacity).long()] = True
        keep = keep | first[:capacity]
    kept_before = torch.cat([keep.new_zeros(1, dtype=torch.int32), keep.cumsum(0, dtype=torch.int32)])  # [capacity + 1]
    # Dropped entries are all written to one spare place behind the list.
    target = torch.where(keep, kept_before[:-1], capacity).long()
    new_slots = slots.new_zeros(capacity + 1).scatter_(0, target, slots)[:capacity].clone()
    return new_slots, kept_before[cu_seqlens.long()]
