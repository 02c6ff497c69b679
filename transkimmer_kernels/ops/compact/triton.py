"""`compact` in Triton: survivors counted per block, then written behind those of the blocks before.

Moves, per position: 1 byte of mask, read twice, 4 bytes of slot in for a survivor and 4 out. Every program re-reads up
to 1024 block counts (4 KiB, from L2) instead of waiting for a scan kernel: their number is bounded, and what a larger
list needs is longer blocks, not more of them. Up to 2048 positions are one block, which needs no counts and no first
kernel.

Which positions begin a sequence, and which offsets fall into a tile, is found by bisection in `cu_seqlens`: no program
walks the whole batch, however many sequences it has, and no marks have to be written and read back. An offset's new
value is the rank of the position before it, picked out of the tile's running count.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import triton_support
from ...library import implement
from ...triton_blocks import lower_bound
from ...triton_support import Specialisation, specialise

_TILE = 2048  # positions taken at a time
_MAX_BLOCKS = 1024
_OFFSETS = 256  # offsets taken at a time: one per thread
_NUM_WARPS = 8
# None of these may lead to another kernel: they change with the batch.
_COUNTS = ["batch", "tiles"]


@triton.jit
def _load_kept(p_keep, p_cu_seqlens, batch, count, o_position, KEEP_FIRST: tl.constexpr):
    """1 for every position that survives, else 0."""
    m_listed = o_position < count
    kept = tl.load(p_keep + o_position, mask=m_listed, other=0) != 0
    if KEEP_FIRST:
        # Any offset below the count begins a sequence that is not empty: the last one of equal offsets does.
        entry = lower_bound(p_cu_seqlens, batch, o_position)
        kept |= tl.load(p_cu_seqlens + entry, mask=m_listed, other=-1) == o_position
    return kept.to(tl.int32)


@triton.jit(do_not_specialize=_COUNTS)
def _count_kept(p_counts, p_keep, p_cu_seqlens, batch, tiles, KEEP_FIRST: tl.constexpr, TILE: tl.constexpr):
    """counts[block] = survivors among the block's `tiles` tiles."""
    count = tl.load(p_cu_seqlens + batch).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * tiles * TILE
    b_kept = tl.full([TILE], 0, tl.int32)
    end = tl.minimum(first + tiles * TILE, count)
    start = first
    while start < end:  # not `range`: with NumPy 2.4, Triton 3.6's interpreter cannot take bounds from the device
        o_position = start + tl.arange(0, TILE).to(tl.int64)  # [TILE]
        b_kept += _load_kept(p_keep, p_cu_seqlens, batch, count, o_position, KEEP_FIRST)
        start += TILE
    tl.store(p_counts + tl.program_id(0), tl.sum(b_kept))


@triton.jit(do_not_specialize=_COUNTS)
def _write_kept(
    p_new_slots,
    p_new_cu_seqlens,
    p_counts,
    p_keep,
    p_slots,
    p_cu_seqlens,
    batch,
    tiles,
    KEEP_FIRST: tl.constexpr,
    TILE: tl.constexpr,
    OFFSETS: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
):
    """Slots of the survivors of the block's tiles, and the new values of the offsets in them."""
    count = tl.load(p_cu_seqlens + batch).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * tiles * TILE
    # The first tile is visited even if nothing is listed: the offsets, all 0, are written there.
    end = tl.minimum(first + tiles * TILE, tl.maximum(count, 1))
    if first >= end:
        return
    o_block = tl.arange(0, MAX_BLOCKS)
    base = tl.sum(tl.load(p_counts + o_block, mask=o_block < tl.program_id(0), other=0))  # survivors before this tile
    start = first
    while start < end:
        o_position = start + tl.arange(0, TILE).to(tl.int64)  # [TILE]
        b_kept = _load_kept(p_keep, p_cu_seqlens, batch, count, o_position, KEEP_FIRST)
        b_slot = tl.load(p_slots + o_position, mask=b_kept != 0)
        b_rank = tl.cumsum(b_kept, 0)  # [TILE], of survivors from 1
        tl.store(p_new_slots + (base + b_rank - 1).to(tl.int64), b_slot, mask=b_kept != 0)

        # Offsets from start + 1 to start + TILE belong to this tile, because the rank that they ask for does; so one
        # that equals the capacity needs no tile behind the last. Offsets of 0 belong to the first tile.
        o_edge = start + tl.arange(0, 2).to(tl.int64) * TILE  # [2]
        b_edge = lower_bound(p_cu_seqlens, batch, tl.where(o_edge > 0, o_edge + 1, 0))
        entry, last = tl.min(b_edge), tl.max(b_edge)
        while entry < last:
            o_entry = entry + tl.arange(0, OFFSETS).to(tl.int64)  # [OFFSETS]
            m_entry = o_entry < last
            b_offset = tl.load(p_cu_seqlens + o_entry, mask=m_entry, other=0)
            b_before = tl.gather(b_rank, tl.maximum(b_offset - start - 1, 0).to(tl.int32), 0)
            b_before = tl.where(b_offset > 0, base + b_before, 0)
            tl.store(p_new_cu_seqlens + o_entry, b_before, mask=m_entry)
            entry += OFFSETS
        base += tl.sum(b_kept)
        start += TILE


@implement("compact", "triton", available=triton_support.why_not)
def compact(keep: Tensor, slots: Tensor, cu_seqlens: Tensor, keep_first: bool) -> tuple[Tensor, Tensor]:
    cu_seqlens, batch = cu_seqlens.contiguous(), cu_seqlens.numel() - 1
    new_slots, new_cu_seqlens = torch.empty_like(slots), torch.empty_like(cu_seqlens)
    tiles = max(1, triton.cdiv(slots.numel(), _TILE))
    tiles_per_block = triton.cdiv(tiles, _MAX_BLOCKS)
    blocks = triton.cdiv(tiles, tiles_per_block)
    counts = slots.new_empty(blocks)
    keep = keep.view(torch.uint8)
    sizes = {"batch": batch, "tiles": tiles_per_block}
    flags = {"KEEP_FIRST": keep_first, "TILE": _TILE, "num_warps": _NUM_WARPS}
    with torch.cuda.device_of(slots):
        if blocks > 1:  # the first block asks for no counts
            _count_kept[(blocks,)](counts, keep, cu_seqlens, **sizes, **flags)
        _write_kept[(blocks,)](
            new_slots,
            new_cu_seqlens,
            counts,
            keep,
            slots,
            cu_seqlens,
            **sizes,
            **flags,
            OFFSETS=_OFFSETS,
            MAX_BLOCKS=_MAX_BLOCKS,
        )
    return new_slots, new_cu_seqlens


def specialisations() -> Iterator[Specialisation]:
    """Both kernels, with and without the first tokens."""
    for keep_first in (False, True):
        flags = {"KEEP_FIRST": keep_first, "TILE": _TILE, "num_warps": _NUM_WARPS}
        for kernel, name, keywords in (
            (_count_kept, "count", flags),
            (_write_kept, "write", {**flags, "OFFSETS": _OFFSETS, "MAX_BLOCKS": _MAX_BLOCKS}),
        ):
            label = f"compact {name}{' keep_first' if keep_first else ''}"
            yield specialise(label, kernel, "i32", keywords, {"p_keep": "*u8"})
