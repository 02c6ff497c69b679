"""`skim_logit` in Triton: LayerNorm -> Linear -> LayerNorm -> GELU -> dot, over the listed rows only.

In one of two forms, by configuration:

* fused: a program of `_product` owns a tile of rows times a tile of the inner columns. It reads its rows through
  `slots`, once for their statistics and once more, from cache, to normalise them on the way into the matrix product; so
  neither gathered nor normalised rows are ever written. Where one column tile holds the whole inner row (m <= 256), the
  second LayerNorm, the GELU and the dot product follow in registers, and 4 bytes per row are written. Wider predictors
  do not fit: `_product` writes the inner rows in the model's dtype (2 m bytes per row in bf16, and as many read back),
  and `_finish` takes it from there.
* steps: the rows are normalised into a list of their own (`norms`), the product is `ragged_linear`'s, and `_finish`
  follows. What is written and read back lies in the L2 cache, and a product whose operands need no arithmetic first is
  so much faster that a wide predictor takes half to three quarters of the time (docs/gpu.md).

The same kernels serve `skim_tokens`: told to, they write a decision of 1 byte instead of a logit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import triton_support
from ...library import implement
from ...triton_blocks import centre, multiprocessors
from ...triton_support import Specialisation
from ...tuning import Tunable
from ..ragged_linear.norms import normalise, sum_of_parts
from ..ragged_linear.triton import fast_gelu, product

# Triton 3.6's interpreter multiplies the bit patterns of bf16 operands; in fp32 their product is the same.
_WIDEN = tl.constexpr(triton_support.interpreted())


@triton.jit
def _row_statistics(p_row, m_row, eps, D: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr):
    """Mean and 1 / standard deviation [BM] of rows of D elements, in one pass.

    Each block of columns is centred on its own mean and merged into what came before (Chan et al., 1979): like two
    passes, and unlike the difference of two moments, this cancels nothing.
    """
    b_mean = tl.zeros([BM], tl.float32)
    b_squares = tl.zeros([BM], tl.float32)  # sum of squared distances from the mean
    for before in range(0, D, BS):
        o_s = before + tl.arange(0, BS)
        m_x = m_row[:, None] & (o_s < D)[None, :]
        b_x = tl.load(p_row[:, None] + o_s[None, :], mask=m_x, other=0).to(tl.float32)  # [BM, BS]
        size = tl.minimum(BS, D - before)
        b_block_mean = tl.sum(b_x, 1) / size
        b_centred = tl.where((o_s < D)[None, :], b_x - b_block_mean[:, None], 0)
        b_step = b_block_mean - b_mean
        b_squares += tl.sum(b_centred * b_centred, 1) + b_step * b_step * before * size / (before + size)
        b_mean += b_step * size / (before + size)
    return b_mean, 1 / tl.sqrt(b_squares / D + eps)


@triton.jit
def _logit(b_inner, m_n, b_weight, b_bias, b_out_weight, b_out_bias, eps, M: tl.constexpr, EXACT: tl.constexpr):
    """The rest of the predictor [R] on whole inner rows [R, N] in fp32; parameters [N] are 0 in columns from M on.

    EXACT: GELU by erf, else by an expression whose error is lost in 16 bits.
    """
    b_centred, _, b_scale = centre(tl.where(m_n[None, :], b_inner, 0), m_n, eps, M)
    b_normed = b_centred * b_scale[:, None] * b_weight[None, :] + b_bias[None, :]
    if EXACT:  # noqa: SIM108 (no expression in a kernel)
        b_gelu = b_normed * (0.5 + 0.5 * tl.erf(b_normed * 0.7071067811865476))
    else:
        b_gelu = fast_gelu(b_normed)
    return tl.sum(b_gelu * b_out_weight[None, :], 1) + b_out_bias


@triton.jit
def _store_result(p_out, o_row, m_row, b_logit, threshold, DECIDE: tl.constexpr):
    """The logits, or 0 where a logit is below the threshold and 1 elsewhere: a NaN is not below, and stays."""
    if DECIDE:
        tl.store(p_out + o_row, tl.where(b_logit < threshold, 0, 1).to(tl.uint8), mask=m_row)
    else:
        tl.store(p_out + o_row, b_logit, mask=m_row)


@triton.jit(do_not_specialize=["batch"])
def _product(
    p_out,  # results [capacity] if one column tile is the whole row, else inner rows [capacity, M]
    p_hidden,
    p_slots,
    p_cu_seqlens,
    batch,
    p_norm1_weight,
    p_norm1_bias,
    p_fc_weight,
    p_fc_bias,
    p_norm2_weight,
    p_norm2_bias,
    p_out_weight,
    p_out_bias,
    eps,
    threshold,
    DECIDE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BS: tl.constexpr,
):
    """LN(hidden[slots]) @ fc^T + bias, rounded; and the rest where BN >= M. Grid: row tiles x column tiles."""
    column_tiles: tl.constexpr = (M + BN - 1) // BN
    # Programs that run side by side share rows: those are the larger operand.
    first_row = (tl.program_id(0) // column_tiles).to(tl.int64) * BM
    count = tl.load(p_cu_seqlens + batch)
    if first_row >= count:
        return
    o_row = first_row + tl.arange(0, BM)  # [BM]
    m_row = o_row < count
    # A slot beyond the count is garbage, and neither read nor followed.
    p_row = p_hidden + tl.load(p_slots + o_row, mask=m_row, other=0).to(tl.int64) * D
    b_mean, b_scale = _row_statistics(p_row, m_row, eps, D, BM, BS)

    o_n = tl.program_id(0) % column_tiles * BN + tl.arange(0, BN)  # [BN]
    m_n = o_n < M
    dtype: tl.constexpr = p_hidden.dtype.element_ty
    b_acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, D, BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < D
        b_x = tl.load(p_row[:, None] + o_k[None, :], mask=m_row[:, None] & m_k[None, :], other=0).to(tl.float32)
        b_weight = tl.load(p_norm1_weight + o_k, mask=m_k, other=0).to(tl.float32)
        b_bias = tl.load(p_norm1_bias + o_k, mask=m_k, other=0).to(tl.float32)
        b_x = (b_x - b_mean[:, None]) * b_scale[:, None] * b_weight[None, :] + b_bias[None, :]  # [BM, BK]
        p_fc = p_fc_weight + o_n[None, :] * D + o_k[:, None]
        b_fc = tl.load(p_fc, mask=m_k[:, None] & m_n[None, :], other=0)  # [BK, BN]
        b_x = b_x.to(dtype)
        if _WIDEN:
            b_x, b_fc = b_x.to(tl.float32), b_fc.to(tl.float32)
        b_acc = tl.dot(b_x, b_fc, b_acc, input_precision="ieee")

    b_inner = (b_acc + tl.load(p_fc_bias + o_n, mask=m_n, other=0).to(tl.float32)[None, :]).to(dtype)
    if column_tiles == 1:
        b_weight = tl.load(p_norm2_weight + o_n, mask=m_n, other=0).to(tl.float32)
        b_bias = tl.load(p_norm2_bias + o_n, mask=m_n, other=0).to(tl.float32)
        b_out_weight = tl.load(p_out_weight + o_n, mask=m_n, other=0).to(tl.float32)
        b_out_bias = tl.load(p_out_bias).to(tl.float32)
        parameters = (b_weight, b_bias, b_out_weight, b_out_bias)
        b_logit = _logit(b_inner.to(tl.float32), m_n, *parameters, eps, M, dtype == tl.float32)
        _store_result(p_out, o_row, m_row, b_logit, threshold, DECIDE)
    else:
        tl.store(p_out + o_row[:, None] * M + o_n[None, :], b_inner, mask=m_row[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["batch", "most_split"])
def _finish(
    p_out,
    p_inner,
    p_partial,  # fp32 [SPLIT, most_split, M] or None: summed up instead of p_inner, of up to most_split rows
    p_fc_bias,  # [M], added to that sum; None without p_partial
    p_cu_seqlens,
    batch,
    most_split,
    p_norm2_weight,
    p_norm2_bias,
    p_out_weight,
    p_out_bias,
    eps,
    threshold,
    DECIDE: tl.constexpr,
    M: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """From inner rows [capacity, M] to results; a row lies in one tile, BN >= M, and a program walks over tiles."""
    count = tl.load(p_cu_seqlens + batch)
    o_n = tl.arange(0, BN)
    m_n = o_n < M
    b_weight = tl.load(p_norm2_weight + o_n, mask=m_n, other=0).to(tl.float32)
    b_bias = tl.load(p_norm2_bias + o_n, mask=m_n, other=0).to(tl.float32)
    b_out_weight = tl.load(p_out_weight + o_n, mask=m_n, other=0).to(tl.float32)
    b_out_bias = tl.load(p_out_bias).to(tl.float32)
    first = tl.program_id(0) * BM
    while first < count:
        o_row = first + tl.arange(0, BM)  # [BM]
        m_row = o_row < count
        p_tile = p_inner + o_row.to(tl.int64)[:, None] * M + o_n[None, :]
        m_tile = m_row[:, None] & m_n[None, :]
        if p_partial is None:
            b_inner = tl.load(p_tile, mask=m_tile, other=0).to(tl.float32)  # [BM, BN]
        elif count <= most_split:
            b_inner = sum_of_parts(p_partial, p_fc_bias, None, None, o_row, o_n, m_row, m_n, most_split, M, SPLIT)
        else:
            b_inner = tl.load(p_tile, mask=m_tile, other=0).to(tl.float32)
        parameters = (b_weight, b_bias, b_out_weight, b_out_bias)
        b_logit = _logit(b_inner, m_n, *parameters, eps, M, p_inner.dtype.element_ty == tl.float32)
        _store_result(p_out, o_row, m_row, b_logit, threshold, DECIDE)
        first += tl.num_programs(0) * BM


class _Tile(NamedTuple):
    """How `_product` is cut, rows x inner columns of a program and the length of its steps; or that it does not run."""

    rows: int
    columns: int
    k: int
    num_warps: int
    num_stages: int
    form: str = "fused"  # or "steps"


def _default(dtype: torch.dtype, width: int, inner: int) -> _Tile:
    """In steps, which an H200 computes faster (docs/gpu.md); fp32 and tiles: by what compiles without spilling."""
    # Statistics are computed once per column tile: few wide tiles, unless much of the last one would be empty.
    wide = 128 < inner <= 256 or inner % 256 == 0
    if dtype == torch.float32:  # plain multiply-adds: operands live in registers, so tiles are small
        tile = _Tile(16, 256, 16, num_warps=8, num_stages=3) if wide else _Tile(32, 64, 16, num_warps=4, num_stages=3)
    else:
        tile = _Tile(64, 256, 64, num_warps=8, num_stages=3) if wide else _Tile(64, 128, 64, num_warps=4, num_stages=3)
        tile = tile._replace(form="steps")
    return tile._replace(columns=min(tile.columns, _widest(inner)))


def _widest(inner: int) -> int:
    """Columns of a tile that holds a whole inner row."""
    return max(16, triton.next_power_of_2(inner))


def _candidates(dtype: torch.dtype, width: int, inner: int) -> Iterator[_Tile]:
    half = dtype != torch.float32
    yield _default(dtype, width, inner)._replace(form="fused" if half else "steps")
    rows, k, stages = ((32, 64, 128), 64, (2, 3, 4)) if half else ((16, 32, 64), 16, (2, 3))
    for tile in itertools.product(rows, (64, 128, 256), (k,), (4, 8), stages):
        if tile[1] <= _widest(inner):
            yield _Tile(*tile)


TUNABLE = Tunable("skim_logit", _default, _candidates)


class _Config(NamedTuple):
    """Constants and options of one launch."""

    constants: dict[str, Any]
    num_warps: int
    num_stages: int


def _product_config(tile: _Tile, dtype: torch.dtype, width: int, inner: int, decide: bool) -> _Config:
    # Statistics wait for memory and for nothing else: 64 bytes per thread are under way at a time.
    block_statistics = max(1, 64 // dtype.itemsize * 32 * tile.num_warps // tile.rows)
    blocks = {"BM": tile.rows, "BN": tile.columns, "BK": tile.k}
    blocks["BS"] = min(block_statistics, triton.next_power_of_2(width))
    constants = {"DECIDE": decide and tile.columns >= inner, "D": width, "M": inner, **blocks}
    return _Config(constants, tile.num_warps, tile.num_stages)


_PROGRAMS = 16  # of `_finish`, per multiprocessor: each is a warp, which sums up a row without shared memory


def _finish_config(inner: int, decide: bool, split: int) -> _Config:
    columns = triton.next_power_of_2(inner)
    rows, warps = max(1, 1024 // columns), min(max(1, columns // 1024), 8)
    constants = {"DECIDE": decide, "M": inner, "SPLIT": split, "BM": rows, "BN": columns}
    return _Config(constants, num_warps=warps, num_stages=2)


def score_tokens(
    hidden: Tensor, slots: Tensor, cu_seqlens: Tensor, weights: tuple[Tensor, ...], eps: float, threshold: float | None
) -> Tensor:
    """fp32 [capacity] logits; with a threshold bool [capacity], whether a token's logit is not below it."""
    capacity, decide = slots.numel(), threshold is not None
    out = hidden.new_empty(capacity, dtype=torch.uint8 if decide else torch.float32)
    cu_seqlens, batch = cu_seqlens.contiguous(), cu_seqlens.numel() - 1
    weights = tuple(weight.contiguous() for weight in weights)
    width, inner = hidden.size(1), weights[3].numel()
    scalars = (eps, threshold or 0.0)
    tile = TUNABLE.config(hidden.device, hidden.dtype, width, inner)
    if capacity == 0:
        return out.view(torch.bool) if decide else out
    processors, partial = multiprocessors(hidden.device), None
    with torch.cuda.device_of(hidden):
        if tile.form == "steps":
            normed, fused = hidden.new_empty(capacity, width), False
            norm = (weights[0], weights[1], eps, cu_seqlens)
            normalise(hidden, *norm, normed, capacity=capacity, source_slots=slots)
            inner_rows, partial = product(normed, weights[2], weights[3], cu_seqlens, None, summed=True)
        else:
            config = _product_config(tile, hidden.dtype, width, inner, decide)
            block_columns = config.constants["BN"]
            fused = block_columns >= inner
            inner_rows = out if fused else hidden.new_empty(capacity, inner)
            grid = (triton.cdiv(capacity, config.constants["BM"]) * triton.cdiv(inner, block_columns),)
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            arguments = (inner_rows, hidden, slots, cu_seqlens, batch, *weights, *scalars)
            _product[grid](*arguments, **config.constants, **options)
        if not fused:
            split, most_split = (1, 0) if partial is None else partial.shape[:2]
            config = _finish_config(inner, decide, split)
            programs = min(triton.cdiv(capacity, config.constants["BM"]), _PROGRAMS * processors)
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            summed = (None, None) if partial is None else (partial, weights[3])
            arguments = (out, inner_rows, *summed, cu_seqlens, batch, most_split, *weights[4:], *scalars)
            _finish[(programs,)](*arguments, **config.constants, **options)
    return out.view(torch.bool) if decide else out


@implement("skim_logit", "triton", available=triton_support.why_not)
def skim_logit(
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
    eps: float,
) -> Tensor:
    weights = (norm1_weight, norm1_bias, fc_weight, fc_bias, norm2_weight, norm2_bias, out_weight, out_bias)
    return score_tokens(hidden, slots, cu_seqlens, weights, eps, None)


def specialisations() -> Iterator[Specialisation]:
    """Predictors of MiniLM's and BERT-base's width, fused and not, in every dtype."""
    kinds = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    for dtype, kind in kinds.items():
        for width, inner, decide in ((384, 192, True), (384, 384, False), (768, 768, False)):
            tiles = TUNABLE.shipped(dtype, width, inner)
            for number, tile in enumerate(t for t in tiles if t.form == "fused"):
                name = f"product {width}->{inner} {kind}" + (f" measured {number}" if number else "")
                config = _product_config(tile, dtype, width, inner, decide)
                yield replace(_specialisation(name, _product, kind, config, dtype != torch.float32), target=tiles[tile])
            if any(tile.form == "steps" or tile.columns < inner for tile in tiles):
                for split in (1, 2):
                    config = _finish_config(inner, decide, split)
                    absent = {"p_partial": None, "p_fc_bias": None} if split == 1 else {}
                    config = config._replace(constants=config.constants | absent)
                    name = f"finish {inner} {kind}" + (f" sum of {split}" if split > 1 else "")
                    yield _specialisation(name, _finish, kind, config, False)


def _specialisation(name: str, kernel: Any, kind: str, config: _Config, matmul: bool) -> Specialisation:
    types = {"p_slots": "*i32", "p_cu_seqlens": "*i32", "batch": "i32", "eps": "fp32", "threshold": "fp32"}
    types |= {"p_partial": "*fp32", "most_split": "i32"}
    if config.constants["DECIDE"]:
        types["p_out"] = "*u8"
    elif kernel is _finish or config.constants["BN"] >= config.constants["M"]:
        types["p_out"] = "*fp32"
    arguments = [argument for argument in kernel.arg_names if argument not in config.constants]
    return Specialisation(
        name=f"skim_logit {name}",
        kernel=kernel,
        signature={argument: types.get(argument, f"*{kind}") for argument in arguments},
        constants=config.constants,
        aligned=tuple(argument for argument in arguments if argument.startswith("p_")),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        matmul=matmul,
    )
