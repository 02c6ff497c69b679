"""`gather_rows` and `scatter_rows` in Triton: one copy kernel, which names either the source or the target row by slot.

Moves each listed row once in and once out, plus 4 bytes of slot per row and column tile; `scatter_rows` first fills its
result with zeros, so that it writes the listed rows twice (stream order makes the second write the last).

Values are not looked at: rows are copied as integers of up to 4 bytes, so one kernel serves every dtype. The width of a
row is a compile-time constant. It belongs to the model, and knowing it lets the compiler copy 16 bytes at a time
wherever rows begin at multiples of 16 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import triton_support
from ...library import implement
from ...triton_support import Specialisation, specialise

_UNITS = {4: torch.int32, 2: torch.int16, 1: torch.int8}  # bytes -> what rows are copied in
_TILE = 2048  # units that a program copies: 16 per thread, four 16-byte accesses in flight
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["batch"])
def _move_rows(
    p_y,
    p_x,
    p_slots,
    p_cu_seqlens,
    batch,
    WIDTH: tl.constexpr,
    SCATTER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y[i] = x[slots[i]], or y[slots[i]] = x[i], for i < token count. Grid: row tiles x column tiles."""
    column_tiles: tl.constexpr = (WIDTH + BN - 1) // BN
    first_row = (tl.program_id(0) // column_tiles).to(tl.int64) * BM
    count = tl.load(p_cu_seqlens + batch)
    if first_row >= count:
        return
    o_row = first_row + tl.arange(0, BM)  # [BM]
    m_row = o_row < count
    # A slot beyond the count is garbage, and neither read nor followed.
    b_slot = tl.load(p_slots + o_row, mask=m_row, other=0).to(tl.int64)
    o_column = tl.program_id(0) % column_tiles * BN + tl.arange(0, BN)[None, :]  # [1, BN]
    m_tile = m_row[:, None] & (o_column < WIDTH)
    o_source = o_row if SCATTER else b_slot
    o_target = b_slot if SCATTER else o_row
    b_x = tl.load(p_x + o_source[:, None] * WIDTH + o_column, mask=m_tile)  # [BM, BN]
    tl.store(p_y + o_target[:, None] * WIDTH + o_column, b_x, mask=m_tile)


@implement("gather_rows", "triton", available=triton_support.why_not)
def gather_rows(x: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
    y = x.new_empty((slots.numel(), *x.shape[1:]))
    _launch(y, x, slots, cu_seqlens, scatter=False)
    return y


@implement("scatter_rows", "triton", available=triton_support.why_not)
def scatter_rows(x: Tensor, slots: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    y = x.new_zeros((num_rows, *x.shape[1:]))
    _launch(y, x, slots, cu_seqlens, scatter=True)
    return y


def _launch(y: Tensor, x: Tensor, slots: Tensor, cu_seqlens: Tensor, *, scatter: bool) -> None:
    if y.numel() == 0 or x.numel() == 0:
        return
    row_bytes = math.prod(x.shape[1:]) * x.element_size()
    # A view of `x` may begin anywhere in its storage; `y` is fresh.
    unit = math.gcd(row_bytes, x.storage_offset() * x.element_size(), max(_UNITS))
    width = row_bytes // unit
    shape = _shape(width)
    grid = (triton.cdiv(slots.numel(), shape["BM"]) * triton.cdiv(width, shape["BN"]),)
    with torch.cuda.device_of(x):
        _move_rows[grid](
            y.view(-1).view(_UNITS[unit]),
            x.view(-1).view(_UNITS[unit]),
            slots,
            cu_seqlens.contiguous(),
            cu_seqlens.numel() - 1,
            SCATTER=scatter,
            **shape,
        )


def _shape(width: int) -> dict[str, int]:
    """A tile's columns divide the width, where one warp's worth or more does."""
    divisor = width & -width
    columns = min(triton.next_power_of_2(width), max(128, min(divisor, 512)))
    return {"WIDTH": width, "BM": _TILE // columns, "BN": columns, "num_warps": _NUM_WARPS}


def specialisations() -> Iterator[Specialisation]:
    """Hidden rows of the usual widths, a row that no vector access fits, and a row of one element."""
    for name, unit, width in (("384xbf16", 4, 192), ("768xfp32", 4, 768), ("33xbf16", 2, 33), ("1xbool", 1, 1)):
        types = dict.fromkeys(("p_y", "p_x"), f"*i{8 * unit}")
        for scatter in (False, True):
            label = f"{'scatter' if scatter else 'gather'}_rows {name}"
            yield specialise(label, _move_rows, "i32", {"SCATTER": scatter, **_shape(width)}, types)
