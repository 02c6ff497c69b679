"""LayerNorm over the rows that count, whose number is read on the device: behind a product, and before the predictor.

A program is one warp that takes ROWS rows at a time, and walks on: the host knows only the capacity, and a program for
every row there is room for would take longer to launch than the rows that are left take to compute. What is normalised
is a row of `p_total`; or, of few rows, the sum of the partial products of `ragged_linear` with bias and residual.
Reads and writes [count, SIZE] once, mostly in the L2 cache, by slots on either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import centre, multiprocessors, places
from .triton_support import DTYPE_NAMES, Specialisation, specialise

_ROWS = 2
_PROGRAMS = 16  # per multiprocessor
_REGISTERS = 200  # left to itself, the assembler stops earlier for the sake of occupancy, and spills


@triton.jit
def _sum_of_parts(
    p_partial,
    p_bias,
    p_residual,
    p_residual_slots,
    o_row,
    o_col,
    m_row,
    m_col,
    most_split,
    SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """[ROWS, BLOCK] in fp32: the partial products of the rows, their residual and the bias, where there are such."""
    m_x = m_row[:, None] & m_col[None, :]
    if p_residual is not None:
        p_r = p_residual + places(p_residual_slots, o_row, m_row)[:, None] * SIZE + o_col[None, :]
        b_x = tl.load(p_r, mask=m_x, other=0.0).to(tl.float32)
    else:
        b_x = tl.zeros(m_x.shape, tl.float32)
    if p_bias is not None:
        b_x += tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    for part in tl.static_range(SPLIT):
        o_part = (part * most_split + o_row).to(tl.int64)
        b_x += tl.load(p_partial + o_part[:, None] * SIZE + o_col[None, :], mask=m_x, other=0.0)
    return b_x


@triton.jit
def load_sums(
    p_total,
    p_source_slots,
    p_partial,
    p_bias,
    p_residual,
    p_residual_slots,
    o_row,
    o_col,
    m_row,
    m_col,
    count,
    most_split,
    SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """[ROWS, BLOCK] in fp32: rows of p_total; of up to most_split rows, with p_partial, the sum of parts instead."""
    p_x = p_total + places(p_source_slots, o_row, m_row)[:, None] * SIZE + o_col[None, :]
    m_x = m_row[:, None] & m_col[None, :]
    if p_partial is None:
        b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    elif count <= most_split:
        addends = (p_partial, p_bias, p_residual, p_residual_slots)
        b_x = _sum_of_parts(*addends, o_row, o_col, m_row, m_col, most_split, SIZE, SPLIT)
    else:
        b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    return b_x


@triton.jit(do_not_specialize=["batch", "most_split"])
def norm_kernel(
    p_total,  # [rows, SIZE]
    p_partial,  # fp32 [SPLIT, most_split, SIZE] or None: summed up instead of p_total, of up to most_split rows
    p_sum_bias,  # [SIZE] or None, added to that sum
    p_residual,  # [rows, SIZE], likewise; None without p_partial
    p_residual_slots,  # int32 [capacity] or None
    p_weight,  # [SIZE]
    p_bias,  # [SIZE]
    p_out,  # [rows, SIZE], written; without slots it may be p_total
    p_source_slots,  # int32 [capacity] or None
    p_slots,  # int32 [capacity] or None
    p_cu_seqlens,
    batch,
    most_split,
    eps,
    SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[slots[i]] = LayerNorm(total[source_slots[i]]) * weight + bias for i < cu_seqlens[batch]."""
    count = tl.load(p_cu_seqlens + batch)
    o_col = tl.arange(0, BLOCK)
    m_col = o_col < SIZE
    first = tl.program_id(0) * ROWS
    while first < count:
        o_row = first + tl.arange(0, ROWS)
        m_row = o_row < count
        m_x = m_row[:, None] & m_col[None, :]
        b_x = load_sums(
            *(p_total, p_source_slots, p_partial, p_sum_bias, p_residual, p_residual_slots),
            *(o_row, o_col, m_row, m_col, count, most_split, SIZE, SPLIT),
        )
        b_x, _, b_scale = centre(b_x, m_col, eps, SIZE)
        b_weight = tl.load(p_weight + o_col, mask=m_col, other=0.0).to(tl.float32)
        b_bias = tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)
        b_y = b_x * b_scale[:, None] * b_weight[None, :] + b_bias[None, :]
        p_y = p_out + places(p_slots, o_row, m_row)[:, None] * SIZE + o_col[None, :]
        tl.store(p_y, b_y.to(p_out.dtype.element_ty), mask=m_x)
        first += tl.num_programs(0) * ROWS


# ---- host


class Sums(NamedTuple):
    """What a row is the sum of, see `norm_kernel`; nothing where there are no partial products."""

    partial: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    residual_slots: Tensor | None


_NO_SUMS = Sums(None, None, None, None)


def _shape(size: int, split: int) -> dict[str, int]:
    """Up to 1024 columns one warp holds its rows and sums them up without shared memory."""
    block = triton.next_power_of_2(size)
    rows = max(1, _ROWS * 1024 // max(block, 1024))
    if split > 1 and size == block:  # two such rows and their parts do not fit into a warp's registers
        rows = 1
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(max(1, block // 1024), 16)}


def normalise(
    total: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    cu_seqlens: Tensor,
    out: Tensor,
    *,
    capacity: int,
    source_slots: Tensor | None = None,
    slots: Tensor | None = None,
    sums: Sums = _NO_SUMS,
) -> None:
    """Writes `out`; of up to sums.partial.size(1) rows, `sums` replaces `total`."""
    partial, bias_added, residual, residual_slots = sums if sums.partial is not None else _NO_SUMS
    split, most_split = (1, 0) if partial is None else partial.shape[:2]
    shape = _shape(total.size(1), split)
    programs = min(triton.cdiv(capacity, shape["ROWS"]), _PROGRAMS * multiprocessors(total.device))
    with torch.cuda.device_of(total):
        norm_kernel[(programs,)](
            total,
            partial,
            None if bias_added is None else bias_added.contiguous(),
            residual,
            residual_slots,
            weight.contiguous(),
            bias.contiguous(),
            out,
            source_slots,
            slots,
            cu_seqlens.contiguous(),
            cu_seqlens.numel() - 1,
            most_split,
            eps,
            SIZE=total.size(1),
            SPLIT=split,
            maxnreg=_REGISTERS,
            **shape,
        )


# ---- what is compiled ahead of time


def specialisations() -> Iterator[Specialisation]:
    """At the usual widths, plain, with a scatter, with a gather, and with the partial sums of `tiling`'s splits."""
    sums, slots = ("p_partial", "p_sum_bias", "p_residual"), ("p_residual_slots", "p_source_slots", "p_slots")
    types = dict.fromkeys((*slots, "p_cu_seqlens"), "*i32") | {"p_partial": "*fp32", "eps": "fp32"}
    for kind in DTYPE_NAMES.values():
        for name, sizes, present, split in (
            ("", (384, 768, 1024), (), 1),
            (" scatter", (768,), ("p_slots",), 1),
            (" gather", (768,), ("p_source_slots",), 1),
            (" sum of 2", (768,), (*sums, "p_residual_slots"), 2),
            (" sum of 4", (768,), (*sums, "p_residual_slots"), 4),
            (" sum of 4 scatter", (768, 1024), (*sums, "p_slots"), 4),
        ):
            absent = dict.fromkeys(pointer for pointer in (*sums, *slots) if pointer not in present)
            for size in sizes:
                keywords = {**absent, "SIZE": size, "SPLIT": split, "maxnreg": _REGISTERS, **_shape(size, split)}
                yield specialise(f"norm {size}{name} {kind}", norm_kernel, kind, keywords, types)
