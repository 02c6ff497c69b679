"""LayerNorm over the rows that count, whose number is read on the device: behind a product, and before the predictor.

A program is one warp that takes ROWS rows at a time, and walks on: the host knows only the capacity, and a program for
every row there is room for would take longer to launch than the rows that are left take to compute. What is normalised
is a row of `p_total`; or, of few rows, the sum of the partial products of `product_kernel` with bias and residual.
Reads and writes [count, SIZE] once, mostly in the L2 cache, by slots on either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_blocks import centre, multiprocessors
from ...triton_support import Specialisation

_ROWS = 2
_PROGRAMS = 16  # per multiprocessor
_REGISTERS = 200  # left to itself, the assembler stops earlier for the sake of occupancy, and spills


@triton.jit
def _places(p_slots, o_row, m_row):
    return o_row.to(tl.int64) if p_slots is None else tl.load(p_slots + o_row, mask=m_row, other=0).to(tl.int64)


@triton.jit
def sum_of_parts(
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
        p_r = p_residual + _places(p_residual_slots, o_row, m_row)[:, None] * SIZE + o_col[None, :]
        b_x = tl.load(p_r, mask=m_x, other=0.0).to(tl.float32)
    else:
        b_x = tl.zeros(m_x.shape, tl.float32)
    if p_bias is not None:
        b_x += tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
    for part in tl.static_range(SPLIT):
        o_part = (part * most_split + o_row).to(tl.int64)
        b_x += tl.load(p_partial + o_part[:, None] * SIZE + o_col[None, :], mask=m_x, other=0.0)
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
        p_x = p_total + _places(p_source_slots, o_row, m_row)[:, None] * SIZE + o_col[None, :]
        if p_partial is None:
            b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        elif count <= most_split:
            parts = (p_partial, p_sum_bias, p_residual, p_residual_slots)
            b_x = sum_of_parts(*parts, o_row, o_col, m_row, m_col, most_split, SIZE, SPLIT)
        else:
            b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
        b_x, _, b_scale = centre(b_x, m_col, eps, SIZE)
        b_weight = tl.load(p_weight + o_col, mask=m_col, other=0.0).to(tl.float32)
        b_bias = tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)
        b_y = b_x * b_scale[:, None] * b_weight[None, :] + b_bias[None, :]
        p_y = p_out + _places(p_slots, o_row, m_row)[:, None] * SIZE + o_col[None, :]
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
    elements = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    plain = ("p_total", "p_weight", "p_bias", "p_out")
    sums = ("p_partial", "p_sum_bias", "p_residual")
    slots = ("p_residual_slots", "p_source_slots", "p_slots")
    for dtype, element in elements.items():
        for name, sizes, extra, split in (
            ("", (384, 768, 1024), (), 1),
            (" scatter", (768,), ("p_slots",), 1),
            (" gather", (768,), ("p_source_slots",), 1),
            (" sum of 2", (768,), (*sums, "p_residual_slots"), 2),
            (" sum of 4", (768,), (*sums, "p_residual_slots"), 4),
            (" sum of 4 scatter", (768, 1024), (*sums, "p_slots"), 4),
        ):
            present = (*plain, *extra)
            kinds = dict.fromkeys((*plain, *sums), element) | {"p_partial": "*fp32"} | dict.fromkeys(slots, "*i32")
            absent = dict.fromkeys(key for key in kinds if key not in present)
            signature = {key: kinds[key] for key in present} | {"p_cu_seqlens": "*i32"}
            for size in sizes:
                shape = _shape(size, split)
                yield Specialisation(
                    name=f"norm {size}{name} {str(dtype).removeprefix('torch.')}",
                    kernel=norm_kernel,
                    signature={**signature, "batch": "i32", "most_split": "i32", "eps": "fp32"},
                    constants={
                        **absent,
                        "SIZE": size,
                        "SPLIT": split,
                        "ROWS": shape["ROWS"],
                        "BLOCK": shape["BLOCK"],
                    },
                    aligned=tuple(signature),
                    num_warps=shape["num_warps"],
                    num_stages=3,
                    matmul=False,
                    maxnreg=_REGISTERS,
                )
