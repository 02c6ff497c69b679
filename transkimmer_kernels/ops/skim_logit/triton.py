"""`skim_logit` in Triton: LayerNorm -> Linear -> LayerNorm -> GELU -> dot, over the listed rows only.

In one of two forms, by configuration:

* fused: a program of `_product` owns a tile of rows times a tile of the inner columns. It reads its rows through
  `slots`, once for their statistics and once more, from cache, to normalise them on the way into the matrix product; so
  neither gathered nor normalised rows are ever written. Where one column tile holds the whole inner row (m <= 256), the
  second LayerNorm, the GELU and the dot product follow in registers, and 4 bytes per row are written. Wider predictors
  do not fit: `_product` writes the inner rows in the model's dtype (2 m bytes per row in bf16, and as many read back),
  and `_finish` takes it from there.
* steps: the rows are normalised into a list of their own (`triton_norms`), the product is `ragged_linear`'s, and
  `_finish` follows. What is written and read back lies in the L2 cache, and a product whose operands need no arithmetic
  first is so much faster that a wide predictor takes half to three quarters of the time (docs/gpu.md).

The same kernels serve `skim_tokens`: told to, they write a decision of 1 byte instead of a logit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import triton_support
from ...library import implement
from ...triton_blocks import centre, fast_gelu, multiply_add, multiprocessors
from ...triton_norms import load_sums, normalise
from ...triton_support import DTYPE_NAMES, Specialisation, specialise
from ..ragged_linear.triton import product
from .tiling import TUNABLE, Tiling


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
        b_acc = multiply_add(b_x.to(dtype), b_fc, b_acc)

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
        addends = (p_partial, p_fc_bias, None, None)
        b_inner = load_sums(p_inner, None, *addends, o_row, o_n, m_row, m_n, count, most_split, M, SPLIT)  # [BM, BN]
        parameters = (b_weight, b_bias, b_out_weight, b_out_bias)
        b_logit = _logit(b_inner, m_n, *parameters, eps, M, p_inner.dtype.element_ty == tl.float32)
        _store_result(p_out, o_row, m_row, b_logit, threshold, DECIDE)
        first += tl.num_programs(0) * BM


def _product_keywords(tiling: Tiling, dtype: torch.dtype, width: int, inner: int, decide: bool) -> dict[str, Any]:
    # Statistics wait for memory and for nothing else: 64 bytes per thread are under way at a time.
    block_statistics = max(1, 64 // dtype.itemsize * 32 * tiling.num_warps // tiling.rows)
    blocks = {"BM": tiling.rows, "BN": tiling.columns, "BK": tiling.k}
    blocks["BS"] = min(block_statistics, triton.next_power_of_2(width))
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    return {"DECIDE": decide and tiling.columns >= inner, "D": width, "M": inner, **blocks, **options}


_PROGRAMS = 16  # of `_finish`, per multiprocessor: each is a warp, which sums up a row without shared memory


def _finish_keywords(inner: int, decide: bool, split: int) -> dict[str, Any]:
    columns = triton.next_power_of_2(inner)
    rows, warps = max(1, 1024 // columns), min(max(1, columns // 1024), 8)
    blocks = {"BM": rows, "BN": columns, "num_warps": warps, "num_stages": 2}
    return {"DECIDE": decide, "M": inner, "SPLIT": split, **blocks}


def score_tokens(
    hidden: Tensor, slots: Tensor, cu_seqlens: Tensor, predictor: Sequence[Tensor], eps: float, threshold: float | None
) -> Tensor:
    """fp32 [capacity] logits; with a threshold bool [capacity], whether a token's logit is not below it."""
    capacity, decide = slots.numel(), threshold is not None
    out = hidden.new_empty(capacity, dtype=torch.uint8 if decide else torch.float32)
    cu_seqlens, batch = cu_seqlens.contiguous(), cu_seqlens.numel() - 1
    weights = tuple(weight.contiguous() for weight in predictor)
    width, inner = hidden.size(1), weights[3].numel()
    scalars = (eps, threshold or 0.0)
    tiling = TUNABLE.config(hidden.device, hidden.dtype, width, inner)
    if capacity == 0:
        return out.view(torch.bool) if decide else out
    processors, partial = multiprocessors(hidden.device), None
    with torch.cuda.device_of(hidden):
        if tiling.form == "steps":
            normed, fused = hidden.new_empty(capacity, width), False
            norm = (weights[0], weights[1], eps, cu_seqlens)
            normalise(hidden, *norm, normed, capacity=capacity, source_slots=slots)
            inner_rows, partial = product(normed, weights[2], weights[3], cu_seqlens, None, summed=True)
        else:
            keywords = _product_keywords(tiling, hidden.dtype, width, inner, decide)
            fused = tiling.columns >= inner
            inner_rows = out if fused else hidden.new_empty(capacity, inner)
            grid = (triton.cdiv(capacity, tiling.rows) * triton.cdiv(inner, tiling.columns),)
            _product[grid](inner_rows, hidden, slots, cu_seqlens, batch, *weights, *scalars, **keywords)
        if not fused:
            split, most_split = (1, 0) if partial is None else partial.shape[:2]
            keywords = _finish_keywords(inner, decide, split)
            programs = min(triton.cdiv(capacity, keywords["BM"]), _PROGRAMS * processors)
            summed = (None, None) if partial is None else (partial, weights[3])
            arguments = (out, inner_rows, *summed, cu_seqlens, batch, most_split, *weights[4:], *scalars)
            _finish[(programs,)](*arguments, **keywords)
    return out.view(torch.bool) if decide else out


@implement("skim_logit", "triton", available=triton_support.why_not)
def skim_logit(hidden: Tensor, slots: Tensor, cu_seqlens: Tensor, *weights_and_eps: Any) -> Tensor:
    *predictor, eps = weights_and_eps
    return score_tokens(hidden, slots, cu_seqlens, predictor, eps, None)


# ---- what is compiled ahead of time


def specialisations() -> Iterator[Specialisation]:
    """Predictors of MiniLM's and BERT-base's width, fused and not, in every dtype."""
    for dtype, kind in DTYPE_NAMES.items():
        for width, inner, decide in ((384, 192, True), (384, 384, False), (768, 768, False)):
            tilings = TUNABLE.shipped(dtype, width, inner)
            for number, tiling in enumerate(t for t in tilings if t.form == "fused"):
                name = f"product {width}->{inner} {kind}" + (f" measured {number}" if number else "")
                keywords = _product_keywords(tiling, dtype, width, inner, decide)
                fused, matmul = tiling.columns >= inner, dtype != torch.float32
                yield _specialise(name, _product, kind, keywords, fused, matmul=matmul, target=tilings[tiling])
            if any(tiling.form == "steps" or tiling.columns < inner for tiling in tilings):
                for split in (1, 2):
                    absent = {"p_partial": None, "p_fc_bias": None} if split == 1 else {}
                    name = f"finish {inner} {kind}" + (f" sum of {split}" if split > 1 else "")
                    yield _specialise(name, _finish, kind, _finish_keywords(inner, decide, split) | absent, True)


def _specialise(
    name: str, kernel: Any, kind: str, keywords: dict[str, Any], last: bool, **options: Any
) -> Specialisation:
    """last: whether the kernel writes results, not inner rows."""
    types = {"p_slots": "*i32", "p_cu_seqlens": "*i32", "p_partial": "*fp32", "eps": "fp32", "threshold": "fp32"}
    if last:
        types["p_out"] = "*u8" if keywords["DECIDE"] else "*fp32"
    return specialise(f"skim_logit {name}", kernel, kind, keywords, types, **options)
