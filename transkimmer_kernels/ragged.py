"""`Ragged`: hidden states that never move, and the shrinking list of those still being worked on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ops.checks import check_cu_seqlens, check_tensor, require
from .registry import KernelSet


@dataclass
class Ragged:
    """A batch of variable-length sequences between two layers of an encoder.

    A token's **slot** is its row in `hidden` for the whole forward: for padded input simply its place in the
    flattened [batch * seq] layout, so that padding is dropped, and the result re-padded, without moving a row. What
    shrinks from layer to layer is the list `slots`; a skimmed token is forwarded to the final output by leaving its
    row alone.

    | field        | type                 | meaning                                                              |
    |--------------|----------------------|----------------------------------------------------------------------|
    | `hidden`     | [rows, d]            | a row per slot; layers update the rows of surviving tokens in place  |
    | `slots`      | int32 [capacity]     | slots of the surviving tokens, by sequence then position             |
    | `cu_seqlens` | int32 [batch + 1]    | offsets of the sequences in `slots`; the last one is the token count |
    | `max_seqlen` | int                  | upper bound of a sequence's length, fixed for the whole forward      |

    All are contiguous. Entries of `slots` at and beyond the token count are garbage.
    """

    hidden: Tensor
    slots: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @property
    def batch(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def capacity(self) -> int:
        return self.slots.numel()

    @classmethod
    def from_padded(cls, hidden: Tensor, mask: Tensor | None, kernels: KernelSet) -> Ragged:
        """Padded states [batch, seq, d] and a mask [batch, seq], non-zero at real tokens (None: all are real).

        `hidden` is viewed where it is contiguous, so that layers write into it, else copied. Sequences may be padded on
        any side, and between tokens.
        """
        check_tensor("hidden", hidden, dim=3)
        batch, length, width = hidden.shape
        rows = hidden.contiguous().view(batch * length, width)
        slots = torch.arange(batch * length, dtype=torch.int32, device=hidden.device)
        if length:
            cu_seqlens = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=hidden.device)
        else:
            cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=hidden.device)
        if mask is not None:
            check_tensor("mask", mask, device=hidden.device, shape=(batch, length))
            # A mask that is a slice of another, or expanded, stays a view with strides when it is reshaped.
            slots, cu_seqlens = kernels.compact(as_bool(mask).reshape(-1).contiguous(), slots, cu_seqlens, False)
        return cls(rows, slots, cu_seqlens, length)

    @classmethod
    def from_packed(cls, hidden: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Ragged:
        """Packed states [tokens, d]; `cu_seqlens` int32 [batch + 1] must cover them all.

        `hidden` itself becomes the batch's where it is contiguous, else a copy.
        """
        check_tensor("hidden", hidden, dim=2)
        check_cu_seqlens("cu_seqlens", cu_seqlens, hidden.size(0), hidden.device)
        if hidden.device.type == "cpu":
            covered = int(cu_seqlens[-1])
            require(covered == hidden.size(0), f"cu_seqlens: ends at {covered}, but there are {hidden.size(0)} tokens")
            longest = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
            require(
                max_seqlen is None or max_seqlen >= longest,
                f"max_seqlen: must be at least the longest sequence, {longest}, got {max_seqlen}",
            )
        slots = torch.arange(hidden.size(0), dtype=torch.int32, device=hidden.device)
        longest = hidden.size(0) if max_seqlen is None else max_seqlen
        return cls(hidden.contiguous(), slots, cu_seqlens.contiguous(), longest)

    def keep(self, keep: Tensor, kernels: KernelSet, *, keep_first: bool = True) -> None:
        """Shortens the list to the tokens whose `keep` (bool [capacity], by list position) is true."""
        self.slots, self.cu_seqlens = kernels.compact(keep, self.slots, self.cu_seqlens, keep_first)


def as_bool(mask: Tensor) -> Tensor:
    """Whether each element of a mask is not 0; nothing is computed where it is bool already."""
    return mask if mask.dtype == torch.bool else mask != 0


def first_of_each(cu_seqlens: Tensor, count: int) -> Tensor:
    """bool [count]: the first token of each sequence of int32 [sequences + 1]; no host read."""
    first = torch.zeros(count + 1, dtype=torch.bool, device=cu_seqlens.device)
    return first.index_fill_(0, cu_seqlens[:-1].long(), True)[:count]  # an empty last sequence marks the spare entry
