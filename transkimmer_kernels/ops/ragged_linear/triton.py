"""Matrix products whose row count is read on the device: `ragged_linear` and its normalising variants.

One kernel computes rows @ weight^T with everything that is cheap around it: rows are gathered by `slots` while the
A operand is loaded, and bias, exact GELU or a residual (itself gathered) are applied to the fp32 accumulator. So the
product reads its rows, the weight and the residual once and writes [count, out]; no gathered copy exists. A LayerNorm
needs whole rows, which at BERT's widths do not fit a tile of a product without spilling. So it is a kernel of its own
over the sum that the product wrote, one row per program: it reads and writes [count, out] once more, mostly in the L2
cache, and is where `ragged_linear_norm_` sends its rows to their slots.

The product's programs stay on the device and walk the tiles, because the host knows only the capacity: after a few
layers of skimming most of a grid made for it would be empty. For the same reason the size of the tile is chosen on the
device: large tiles load less per multiply-add, small ones keep all multiprocessors at work once few rows are left.

Sizes come from `tiling.TUNABLE`. Where its table says so, the product is a library's instead (`strategies`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import triton_support
from ...library import implement
from ...triton_blocks import multiprocessors
from ...triton_support import Specialisation
from . import strategies
from .tiling import TUNABLE, Tiling

_INTERPRETED = tl.constexpr(triton_support.interpreted())


@triton.jit
def _walk_tiles(
    p_x,
    p_weight,
    p_bias,
    p_residual,
    p_out,
    p_slots,
    p_residual_slots,
    count,
    SIZE_OUT: tl.constexpr,
    SIZE_IN: tl.constexpr,
    GELU: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The output tiles [BM, BN] that fall to this program."""
    tiles_m = tl.cdiv(count, BM)
    tiles_n = tl.cdiv(SIZE_OUT, BN)
    tile = tl.program_id(0)
    while tile < tiles_m * tiles_n:  # not `range`: with NumPy 2.4, Triton 3.6's interpreter cannot take such bounds
        # Programs that run together take tiles of GROUP tile rows and few tile columns: what they load, they share in
        # the L2 cache.
        first_m = tile // (GROUP * tiles_n) * GROUP
        height = min(tiles_m - first_m, GROUP)
        within = tile % (GROUP * tiles_n)
        o_row = (first_m + within % height) * BM + tl.arange(0, BM)  # places in the list
        o_col = within // height * BN + tl.arange(0, BN)
        o_k = tl.arange(0, BK)
        m_row = o_row < count
        m_col = o_col < SIZE_OUT
        m_out = m_row[:, None] & m_col[None, :]

        # Beyond the last row and column, row 0 is computed and not stored: no mask in the loop, and a wild slot is not
        # even loaded.
        b_source = tl.where(m_row, o_row, 0) if p_slots is None else tl.load(p_slots + o_row, mask=m_row, other=0)
        p_a = p_x + b_source.to(tl.int64)[:, None] * SIZE_IN + o_k[None, :]  # [BM, BK]
        p_b = p_weight + tl.where(m_col, o_col, 0).to(tl.int64)[:, None] * SIZE_IN + o_k[None, :]  # [BN, BK]
        b_acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, SIZE_IN, BK):
            if SIZE_IN % BK == 0:
                b_a = tl.load(p_a + start)
                b_b = tl.load(p_b + start)
            else:
                m_k = (start + o_k < SIZE_IN)[None, :]
                b_a = tl.load(p_a + start, mask=m_k, other=0.0)
                b_b = tl.load(p_b + start, mask=m_k, other=0.0)
            if _INTERPRETED:  # whose `dot` would multiply the bit patterns of bf16
                b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
            b_acc = tl.dot(b_a, b_b.T, b_acc, input_precision="ieee")

        if p_bias is not None:
            b_acc += tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
        if GELU:
            b_acc = 0.5 * b_acc * (1.0 + tl.erf(b_acc * 0.7071067811865476))
        if p_residual is not None:
            b_place = o_row
            if p_residual_slots is not None:
                b_place = tl.load(p_residual_slots + o_row, mask=m_row, other=0)
            p_r = p_residual + b_place.to(tl.int64)[:, None] * SIZE_OUT + o_col[None, :]  # [BM, BN]
            b_acc += tl.load(p_r, mask=m_out, other=0.0).to(tl.float32)
        p_o = p_out + o_row.to(tl.int64)[:, None] * SIZE_OUT + o_col[None, :]  # [BM, BN]
        tl.store(p_o, b_acc.to(p_out.dtype.element_ty), mask=m_out)
        tile += tl.num_programs(0)


@triton.jit(do_not_specialize=["batch", "fewest_large"])
def product_kernel(
    p_x,  # [rows, in]
    p_weight,  # [out, in]
    p_bias,  # [out] or None
    p_residual,  # [rows, out] or None
    p_out,  # [capacity, out], written
    p_slots,  # int32 [capacity] or None
    p_residual_slots,  # int32 [capacity] or None
    p_cu_seqlens,  # int32 [batch + 1]
    batch,
    fewest_large,  # with fewer large tiles than this, small ones
    SIZE_OUT: tl.constexpr,
    SIZE_IN: tl.constexpr,
    GELU: tl.constexpr,
    GROUP: tl.constexpr,
    LARGE_M: tl.constexpr,
    LARGE_N: tl.constexpr,
    LARGE_K: tl.constexpr,
    SMALL_M: tl.constexpr,
    SMALL_N: tl.constexpr,
    SMALL_K: tl.constexpr,
):
    """out[i] = gelu(x[slots[i]] @ weight^T + bias) + residual[residual_slots[i]] for i < cu_seqlens[batch]."""
    count = tl.load(p_cu_seqlens + batch)
    if tl.cdiv(count, LARGE_M) * tl.cdiv(SIZE_OUT, LARGE_N) >= fewest_large:
        _walk_tiles(
            p_x, p_weight, p_bias, p_residual, p_out, p_slots, p_residual_slots, count, SIZE_OUT, SIZE_IN,
            GELU, GROUP, LARGE_M, LARGE_N, LARGE_K,
        )  # fmt: skip
    else:
        _walk_tiles(
            p_x, p_weight, p_bias, p_residual, p_out, p_slots, p_residual_slots, count, SIZE_OUT, SIZE_IN,
            GELU, GROUP, SMALL_M, SMALL_N, SMALL_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch"])
def norm_kernel(
    p_total,  # [capacity, SIZE]
    p_weight,  # [SIZE]
    p_bias,  # [SIZE]
    p_out,  # [rows, SIZE], written; without slots it may be p_total
    p_slots,  # int32 [capacity] or None
    p_cu_seqlens,  # int32 [batch + 1]
    batch,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[slots[i]] = LayerNorm(total[i]) * weight + bias for i < cu_seqlens[batch], one row per program."""
    row = tl.program_id(0)
    if row >= tl.load(p_cu_seqlens + batch):
        return
    o_col = tl.arange(0, BLOCK)
    m_col = o_col < SIZE
    b_x = tl.load(p_total + row.to(tl.int64) * SIZE + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_weight = tl.load(p_weight + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)
    # The row is in registers, so the variance is taken around the mean: with BERT's eps of 1e-12 the difference of two
    # large sums would be noise.
    b_x = tl.where(m_col, b_x - tl.sum(b_x) / SIZE, 0.0)
    b_y = b_x * tl.rsqrt(tl.sum(b_x * b_x) / SIZE + eps) * b_weight + b_bias
    place = row
    if p_slots is not None:
        place = tl.load(p_slots + row)
    tl.store(p_out + place.to(tl.int64) * SIZE + o_col, b_y.to(p_out.dtype.element_ty), mask=m_col)


# ---- host


_GROUP = 8


@functools.cache
def _product_constants(tiling: Tiling, size_out: int, size_in: int, gelu: bool) -> dict[str, Any]:
    names = ("LARGE_M", "LARGE_N", "LARGE_K", "SMALL_M", "SMALL_N", "SMALL_K")
    sizes = dict(zip(names, (*tiling.large, *tiling.small), strict=True))
    return {"SIZE_OUT": size_out, "SIZE_IN": size_in, "GELU": gelu, "GROUP": _GROUP, **sizes}


def _norm_block(size: int) -> tuple[int, int]:
    """(BLOCK, num_warps): up to 1024 columns one warp holds the row and sums it up without shared memory."""
    block = triton.next_power_of_2(size)
    return block, min(max(block // 1024, 1), 16)


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    slots: Tensor | None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    residual_slots: Tensor | None = None,
) -> Tensor:
    """[capacity, out], undefined beyond the token count."""
    size_out, size_in = weight.shape
    tiling = TUNABLE.config(x.device, x.dtype, size_out, size_in)
    if strategies.usable(tiling.strategy, x.dtype, size_out, size_in):
        return strategies.product(tiling.strategy, x, weight, bias, cu_seqlens, slots, gelu, residual, residual_slots)
    capacity = x.size(0) if slots is None else slots.numel()
    out = x.new_empty((capacity, size_out))
    processors = multiprocessors(x.device)
    tiles = triton.cdiv(capacity, tiling.small[0]) * triton.cdiv(size_out, tiling.small[1])
    with torch.cuda.device_of(x):
        product_kernel[(min(tiles, tiling.programs * processors),)](
            x,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            residual,
            out,
            slots,
            residual_slots,
            cu_seqlens,
            cu_seqlens.numel() - 1,
            int(tiling.fewest_large * processors),
            **_product_constants(tiling, size_out, size_in, gelu),
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
    return out


def _normalise(
    total: Tensor, weight: Tensor, bias: Tensor, eps: float, cu_seqlens: Tensor, out: Tensor, slots: Tensor | None
) -> None:
    block, num_warps = _norm_block(total.size(1))
    with torch.cuda.device_of(total):
        norm_kernel[(total.size(0),)](
            total,
            weight.contiguous(),
            bias.contiguous(),
            out,
            slots,
            cu_seqlens,
            cu_seqlens.numel() - 1,
            eps,
            SIZE=total.size(1),
            BLOCK=block,
            num_warps=num_warps,
        )


@implement("ragged_linear", "triton", available=triton_support.why_not)
def ragged_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, slots: Tensor | None, activation: str
) -> Tensor:
    return _product(x, weight, bias, cu_seqlens, slots, gelu=activation == "gelu")


@implement("ragged_linear_norm", "triton", available=triton_support.why_not)
def ragged_linear_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    residual_slots: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    cu_seqlens: Tensor,
) -> Tensor:
    total = _product(x, weight, bias, cu_seqlens, None, residual=residual, residual_slots=residual_slots)
    _normalise(total, norm_weight, norm_bias, eps, cu_seqlens, total, None)
    return total


@implement("ragged_linear_norm_", "triton", available=triton_support.why_not)
def ragged_linear_norm_(
    hidden: Tensor,
    slots: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    cu_seqlens: Tensor,
) -> None:
    total = _product(x, weight, bias, cu_seqlens, None, residual=residual)
    _normalise(total, norm_weight, norm_bias, eps, cu_seqlens, hidden, slots)


# ---- what is compiled ahead of time


def _product_specialisations(
    name: str,
    dtype: torch.dtype,
    size_out: int,
    size_in: int,
    *,
    gelu: bool = False,
    without: tuple[str, ...] = (),
) -> Iterator[Specialisation]:
    """In every configuration that may be chosen; `without`: the pointers that are None."""
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    pointers = dict.fromkeys(("p_x", "p_weight", "p_bias", "p_residual", "p_out"), element)
    pointers |= dict.fromkeys(("p_slots", "p_residual_slots", "p_cu_seqlens"), "*i32")
    present = {pointer: kind for pointer, kind in pointers.items() if pointer not in without}
    ours = [t for t in TUNABLE.shipped(dtype, size_out, size_in) if t.strategy == "triton"]
    for number, tiling in enumerate(ours):
        measured = f" measured {number}" if number else ""
        yield Specialisation(
            name=f"product {name} {size_in}->{size_out} {str(dtype).removeprefix('torch.')}{measured}",
            kernel=product_kernel,
            signature={**present, "batch": "i32", "fewest_large": "i32"},
            constants={**dict.fromkeys(without), **_product_constants(tiling, size_out, size_in, gelu)},
            aligned=tuple(present),
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            matmul=dtype != torch.float32,
        )


def _norm_specialisation(dtype: torch.dtype, size: int, scatter: bool) -> Specialisation:
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    pointers = dict.fromkeys(("p_total", "p_weight", "p_bias", "p_out"), element)
    pointers |= dict.fromkeys(("p_slots", "p_cu_seqlens") if scatter else ("p_cu_seqlens",), "*i32")
    block, num_warps = _norm_block(size)
    return Specialisation(
        name=f"norm {size}{' scatter' if scatter else ''} {str(dtype).removeprefix('torch.')}",
        kernel=norm_kernel,
        signature={**pointers, "batch": "i32", "eps": "fp32"},
        constants={**({} if scatter else {"p_slots": None}), "SIZE": size, "BLOCK": block},
        aligned=tuple(pointers),
        num_warps=num_warps,
        num_stages=3,
        matmul=False,
    )


def specialisations() -> Iterator[Specialisation]:
    """The four products of an encoder layer, some of awkward widths, LayerNorm at the usual ones, and `strategies`."""
    plain = ("p_residual", "p_residual_slots")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield from _product_specialisations("gathered", dtype, 2304, 768, without=plain)
        yield from _product_specialisations("gelu", dtype, 3072, 768, gelu=True, without=(*plain, "p_slots"))
        yield from _product_specialisations("gathered residual", dtype, 768, 768, without=("p_slots",))
        yield from _product_specialisations("residual", dtype, 768, 3072, without=("p_slots", "p_residual_slots"))
        yield from _product_specialisations("gelu", dtype, 1200, 312, gelu=True, without=(*plain, "p_slots", "p_bias"))
        yield from _product_specialisations("gathered gelu", dtype, 99, 33, gelu=True, without=plain)
        for size in (384, 768, 1024):
            yield _norm_specialisation(dtype, size, scatter=size == 768)
        yield _norm_specialisation(dtype, 768, scatter=False)
    yield from strategies.specialisations()
