"""Matrix products whose row count is read on the device: `ragged_linear` and its normalising variants.

One kernel computes rows @ weight^T with everything that is cheap around it: rows are gathered by `slots` while the
A operand is loaded, and bias, exact GELU or a residual (itself gathered) are applied to the fp32 accumulator. So the
product reads its rows, the weight and the residual once and writes [count, out]; no gathered copy exists. A LayerNorm
needs whole rows, which at BERT's widths do not fit a tile of a product without spilling. So it is a kernel of its own
over the sum that the product wrote (`triton_norms`).

The product's programs stay on the device and walk the tiles, because the host knows only the capacity: after a few
layers of skimming most of a grid made for it would be empty. For the same reason the size of the tile is chosen on the
device: large tiles load less per multiply-add, small ones keep all multiprocessors at work once few rows are left. With
very few rows there are too few tiles of any size, and each walks along the whole inner dimension alone: then, where a
LayerNorm follows, that dimension is split among `SPLIT` programs, which write fp32 partial products for it to sum up.

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

from ... import triton_norms, triton_support
from ...library import implement
from ...triton_blocks import exact_gelu, fast_gelu, multiply_add, multiprocessors, places
from ...triton_norms import Sums, normalise
from ...triton_support import DTYPE_NAMES, Specialisation, specialise
from . import strategies
from .tiling import TUNABLE, Tiling

_NO_GELU, _EXACT_GELU, _FAST_GELU = range(3)


@triton.jit
def _multiply(p_a, p_b, LENGTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """[BM, BN] in fp32: LENGTH columns of rows of x times as many of the weight, from blocks of pointers [., BK]."""
    b_acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, LENGTH, BK):
        if LENGTH % BK == 0:
            b_a = tl.load(p_a + start)
            b_b = tl.load(p_b + start)
        else:
            m_k = (start + tl.arange(0, BK) < LENGTH)[None, :]
            b_a = tl.load(p_a + start, mask=m_k, other=0.0)
            b_b = tl.load(p_b + start, mask=m_k, other=0.0)
        b_acc = multiply_add(b_a, b_b.T, b_acc)
    return b_acc


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
    plane,
    SIZE_OUT: tl.constexpr,
    SIZE_IN: tl.constexpr,
    GELU: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    CHAINS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The output tiles [BM, BN] that fall to this program; SPLIT programs share one, and write a plane each."""
    tiles_m = tl.cdiv(count, BM)
    tiles_n = tl.cdiv(SIZE_OUT, BN)
    LENGTH: tl.constexpr = SIZE_IN // SPLIT // CHAINS
    tile = tl.program_id(0)
    while tile < tiles_m * tiles_n * SPLIT:  # not `range`: with NumPy 2.4, 3.6's interpreter cannot take such bounds
        part, place = tile % SPLIT, tile // SPLIT
        # Programs that run together take tiles of GROUP tile rows and few tile columns: what they load, they share in
        # the L2 cache.
        first_m = place // (GROUP * tiles_n) * GROUP
        height = min(tiles_m - first_m, GROUP)
        within = place % (GROUP * tiles_n)
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
        begin = 0 if SPLIT == 1 else part * (SIZE_IN // SPLIT)
        b_acc = _multiply(p_a + begin, p_b + begin, LENGTH, BM, BN, BK)
        for chain in range(1, CHAINS):
            b_acc += _multiply(p_a + begin + chain * LENGTH, p_b + begin + chain * LENGTH, LENGTH, BM, BN, BK)

        if p_bias is not None:
            b_acc += tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)[None, :]
        if GELU == 1:
            b_acc = exact_gelu(b_acc)
        if GELU == 2:
            b_acc = fast_gelu(b_acc)
        if p_residual is not None:
            p_r = p_residual + places(p_residual_slots, o_row, m_row)[:, None] * SIZE_OUT + o_col[None, :]  # [BM, BN]
            b_acc += tl.load(p_r, mask=m_out, other=0.0).to(tl.float32)
        p_o = p_out + part.to(tl.int64) * plane + o_row.to(tl.int64)[:, None] * SIZE_OUT + o_col[None, :]  # [BM, BN]
        tl.store(p_o, b_acc.to(p_out.dtype.element_ty), mask=m_out)
        tile += tl.num_programs(0)


@triton.jit(do_not_specialize=["batch", "fewest_large", "most_split"])
def product_kernel(
    p_x,  # [rows, in]
    p_weight,  # [out, in]
    p_bias,  # [out] or None
    p_residual,  # [rows, out] or None
    p_out,  # [capacity, out], written
    p_partial,  # fp32 [SPLIT, most_split, out] or None, written instead where few rows are left
    p_slots,  # int32 [capacity] or None
    p_residual_slots,  # int32 [capacity] or None
    p_cu_seqlens,  # int32 [batch + 1]
    batch,
    fewest_large,  # with fewer large tiles than this, small ones
    most_split,  # up to so many rows, the inner dimension is split
    SIZE_OUT: tl.constexpr,
    SIZE_IN: tl.constexpr,
    GELU: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    CHAINS: tl.constexpr,
    LARGE_M: tl.constexpr,
    LARGE_N: tl.constexpr,
    LARGE_K: tl.constexpr,
    SMALL_M: tl.constexpr,
    SMALL_N: tl.constexpr,
    SMALL_K: tl.constexpr,
    FEW_M: tl.constexpr,
    FEW_N: tl.constexpr,
    FEW_K: tl.constexpr,
):
    """out[i] = gelu(x[slots[i]] @ weight^T + bias) + residual[residual_slots[i]] for i < cu_seqlens[batch].

    Of at most most_split rows, partial[s] = x @ weight^T over the s-th part of the inner dimension instead.
    """
    count = tl.load(p_cu_seqlens + batch)
    if p_partial is not None:  # noqa: SIM102 (known to the compiler; the count is not)
        if count <= most_split:
            _walk_tiles(
                p_x, p_weight, None, None, p_partial, p_slots, None, count, most_split * SIZE_OUT, SIZE_OUT, SIZE_IN,
                0, GROUP, SPLIT, CHAINS, FEW_M, FEW_N, FEW_K,
            )  # fmt: skip
            return
    if tl.cdiv(count, LARGE_M) * tl.cdiv(SIZE_OUT, LARGE_N) >= fewest_large:
        _walk_tiles(
            p_x, p_weight, p_bias, p_residual, p_out, p_slots, p_residual_slots, count, 0, SIZE_OUT, SIZE_IN,
            GELU, GROUP, 1, CHAINS, LARGE_M, LARGE_N, LARGE_K,
        )  # fmt: skip
    else:
        _walk_tiles(
            p_x, p_weight, p_bias, p_residual, p_out, p_slots, p_residual_slots, count, 0, SIZE_OUT, SIZE_IN,
            GELU, GROUP, 1, CHAINS, SMALL_M, SMALL_N, SMALL_K,
        )  # fmt: skip


# ---- host


_GROUP = 8
_REGISTERS = {torch.float32: 255}  # left to itself, the assembler stops at 168 for the sake of occupancy, and spills
_LONGEST_CHAIN = 192  # of fp32 multiply-adds into one sum: twice that, and its error is thrice that of cuBLAS


@functools.cache
def _product_keywords(
    tiling: Tiling, dtype: torch.dtype, size_out: int, size_in: int, gelu: bool, split: int
) -> dict[str, Any]:
    """Constants and options of a launch."""
    names = ("LARGE_M", "LARGE_N", "LARGE_K", "SMALL_M", "SMALL_N", "SMALL_K", "FEW_M", "FEW_N", "FEW_K")
    sizes = dict(zip(names, (*tiling.large, *tiling.small, *tiling.few), strict=True))
    chains = 1
    if dtype == torch.float32:
        while size_in // chains > _LONGEST_CHAIN and size_in % (2 * chains) == 0:
            chains *= 2
    activation = _NO_GELU if not gelu else _EXACT_GELU if dtype == torch.float32 or size_out % 8 else _FAST_GELU
    shape = {"SIZE_OUT": size_out, "SIZE_IN": size_in, "GELU": activation, **sizes}
    shape |= {"GROUP": _GROUP, "SPLIT": split, "CHAINS": chains}
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages, "maxnreg": _REGISTERS.get(dtype)}
    return {**shape, **options}


def _split(tiling: Tiling, size_in: int) -> int:
    """Programs that share a tile where a kernel follows that sums up."""
    return tiling.split if size_in % (tiling.split * tiling.few[2]) == 0 else 1


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    slots: Tensor | None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    residual_slots: Tensor | None = None,
    summed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """[capacity, out], undefined beyond the token count, and partial products.

    summed: whether a kernel follows that can sum up partial products fp32 [split, most, out] (`triton_norms`): of at
    most so many rows they are written instead, without bias and residual. None where the configuration does not split.
    """
    size_out, size_in = weight.shape
    tiling = TUNABLE.config(x.device, x.dtype, size_out, size_in)
    if strategies.usable(tiling.strategy, x.dtype, size_out, size_in):
        of = (x, weight, bias, cu_seqlens, slots, gelu, residual, residual_slots)
        return strategies.product(tiling.strategy, *of), None
    capacity = x.size(0) if slots is None else slots.numel()
    out = x.new_empty((capacity, size_out))
    split = _split(tiling, size_in) if summed else 1
    most = min(tiling.most_split, capacity)
    partial = None if split == 1 else x.new_empty((split, most, size_out), dtype=torch.float32)
    processors = multiprocessors(x.device)
    few = triton.cdiv(capacity, tiling.few[0]) * triton.cdiv(size_out, tiling.few[1]) * split
    tiles = max(few, triton.cdiv(capacity, tiling.small[0]) * triton.cdiv(size_out, tiling.small[1]))
    with torch.cuda.device_of(x):
        product_kernel[(min(tiles, tiling.programs * processors),)](
            x,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            residual,
            out,
            partial,
            slots,
            residual_slots,
            cu_seqlens.contiguous(),
            cu_seqlens.numel() - 1,
            int(tiling.fewest_large * processors),
            most,
            **_product_keywords(tiling, x.dtype, size_out, size_in, gelu, split),
        )
    return out, partial


@implement("ragged_linear", "triton", available=triton_support.why_not)
def ragged_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, slots: Tensor | None, activation: str
) -> Tensor:
    return product(x, weight, bias, cu_seqlens, slots, gelu=activation == "gelu")[0]


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
    total, partial = product(
        x, weight, bias, cu_seqlens, None, residual=residual, residual_slots=residual_slots, summed=True
    )
    sums = Sums(partial, bias, residual, residual_slots)
    normalise(total, norm_weight, norm_bias, eps, cu_seqlens, total, capacity=total.size(0), sums=sums)
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
    total, partial = product(x, weight, bias, cu_seqlens, None, residual=residual, summed=True)
    sums, capacity = Sums(partial, bias, residual, None), total.size(0)
    normalise(total, norm_weight, norm_bias, eps, cu_seqlens, hidden, capacity=capacity, slots=slots, sums=sums)


# ---- what is compiled ahead of time


def _product_specialisations(
    name: str,
    dtype: torch.dtype,
    size_out: int,
    size_in: int,
    *,
    gelu: bool = False,
    summed: bool = False,
    without: tuple[str, ...] = (),
) -> Iterator[Specialisation]:
    """In every configuration that may be chosen; summed: as in `product`; without: the pointers that are None."""
    kind, slots = DTYPE_NAMES[dtype], ("p_slots", "p_residual_slots", "p_cu_seqlens")
    types = {"p_partial": "*fp32", **dict.fromkeys(slots, "*i32")}
    ours = [item for item in TUNABLE.shipped(dtype, size_out, size_in).items() if item[0].strategy == "triton"]
    for number, (tiling, target) in enumerate(ours):
        measured = f" measured {number}" if number else ""
        split = _split(tiling, size_in) if summed else 1
        absent = (*without, "p_partial") if split == 1 else without
        keywords = _product_keywords(tiling, dtype, size_out, size_in, gelu, split) | dict.fromkeys(absent)
        label = f"product {name} {size_in}->{size_out} {kind}{measured}"
        matmul = dtype != torch.float32
        yield specialise(label, product_kernel, kind, keywords, types, matmul=matmul, target=target)


def specialisations() -> Iterator[Specialisation]:
    """The four products of an encoder layer, some of awkward widths, `triton_norms` and `strategies`."""
    plain = ("p_residual", "p_residual_slots")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield from _product_specialisations("gathered", dtype, 2304, 768, without=plain)
        yield from _product_specialisations("gelu", dtype, 3072, 768, gelu=True, without=(*plain, "p_slots"))
        yield from _product_specialisations("gathered residual", dtype, 768, 768, summed=True, without=("p_slots",))
        listed = ("p_slots", "p_residual_slots")
        yield from _product_specialisations("residual", dtype, 768, 3072, summed=True, without=listed)
        yield from _product_specialisations("predictor", dtype, 768, 768, summed=True, without=("p_residual", *listed))
        yield from _product_specialisations("gelu", dtype, 1200, 312, gelu=True, without=(*plain, "p_slots", "p_bias"))
        yield from _product_specialisations("gathered gelu", dtype, 99, 33, gelu=True, without=plain)
    yield from triton_norms.specialisations()
    yield from strategies.specialisations()
