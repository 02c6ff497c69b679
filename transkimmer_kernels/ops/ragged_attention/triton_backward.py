"""Kernels of `ragged_attention`, backwards: gradients of q, k, v and of the keys' weights.

    P_ij = keep_j E_ij    E_ij = exp(S_ij - lse_i)    dP_ij - D_i = dO_i . v_j - dO_i . O_i
    dQ_i = scale sum_j P_ij (dP_ij - D_i) k_j         dV_j = sum_i P_ij dO_i
    dK_j = scale sum_i P_ij (dP_ij - D_i) q_i         dkeep_j = sum_h sum_i E_ij (dP_ij - D_i)

Scores are computed anew, from lse, instead of being kept: 14 HEAD_DIM FLOPs per query, key and head in two kernels. One
owns queries, the other keys, so that every sum belongs to one program and is added up in a fixed order, without
atomics. A skimmed key (keep_j = 0) has no part in P, but its weight has a gradient, so it is visited like any other.

Tiles lie in one sequence. Training works on whole sentences, where that fills them; and no sequence's NaN can reach
another's gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_blocks import multiply_add
from .triton_forward import LN_2, load_rows, products, scores, store_rows

# Of E for a skimmed key, which stands outside the normaliser: exp(80), as a power of two (`reference.MAX_EXPONENT`).
_MAX_EXPONENT = tl.constexpr(80.0 / LN_2.value)


@triton.jit
def _unweighted(b_scores, b_lse):
    """E: P without the keys' weights; 0 for a query that had no key. lse has the shape of the scores, or of a row."""
    b_e = b_scores - b_lse / LN_2
    # A comparison, not a minimum: NaN has to stay NaN.
    b_e = tl.exp2(tl.where(b_e > _MAX_EXPONENT, _MAX_EXPONENT, b_e))
    return tl.where(b_lse == float("-inf"), 0.0, b_e)


@triton.jit(do_not_specialize=["max_seqlen_q", "capacity_q"])
def grad_queries_kernel(
    p_grad_out,  # [capacity_q, HEADS, HEAD_DIM], contiguous, as is out
    p_q,
    p_k,
    p_v,
    p_keep,
    p_out,
    p_lse,
    p_delta,  # fp32 [HEADS, capacity_q], written: D
    p_grad_q,  # [capacity_q, HEADS, HEAD_DIM], contiguous, written for every listed query
    p_cu_seqlens_q,
    p_cu_seqlens_k,
    max_seqlen_q,
    stride_q,
    stride_k,
    stride_v,
    head_stride_q,
    head_stride_k,
    head_stride_v,
    capacity_q,
    scale,  # of the scores; in the exponent it is used times log2(e)
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dQ and D of a tile of queries. Grid: (sequence, query tile) x head."""
    head = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(max_seqlen_q, BM)
    sequence = tl.program_id(0) // tiles
    first, end = (
        tl.load(p_cu_seqlens_q + sequence) + tl.program_id(0) % tiles * BM,
        tl.load(p_cu_seqlens_q + sequence + 1),
    )
    if first >= end:
        return
    row_stride: tl.constexpr = HEADS * HEAD_DIM
    o_row = first + tl.arange(0, BM)
    m_row = o_row < end
    b_q = load_rows(p_q + head * head_stride_q, o_row, m_row, stride_q, HEAD_DIM, BD)
    b_grad_out = load_rows(p_grad_out + head * HEAD_DIM, o_row, m_row, row_stride, HEAD_DIM, BD)
    b_out = load_rows(p_out + head * HEAD_DIM, o_row, m_row, row_stride, HEAD_DIM, BD)
    b_delta = tl.sum(b_grad_out.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(p_delta + head * capacity_q + o_row, b_delta, mask=m_row)
    b_lse = tl.load(p_lse + head * capacity_q + o_row, mask=m_row, other=float("-inf"))

    b_grad_q = tl.zeros((BM, BD), tl.float32)
    end_key = tl.load(p_cu_seqlens_k + sequence + 1)
    for start in range(tl.load(p_cu_seqlens_k + sequence), end_key, BN):
        o_key = start + tl.arange(0, BN)
        m_key = o_key < end_key
        b_k = load_rows(p_k + head * head_stride_k, o_key, m_key, stride_k, HEAD_DIM, BD)
        b_v = load_rows(p_v + head * head_stride_v, o_key, m_key, stride_v, HEAD_DIM, BD)
        # Behind the last key stand zeros, whose E may be beyond what fp16 holds.
        b_p = tl.where(m_key[None, :], _unweighted(scores(b_q, b_k, scale / LN_2), b_lse[:, None]), 0.0)
        if p_keep is not None:
            b_p *= tl.load(p_keep + o_key, mask=m_key, other=0.0)[None, :]
        b_slope = products(b_grad_out, b_v) - b_delta[:, None]
        b_grad_q = multiply_add((b_p * b_slope).to(b_k.dtype), b_k, b_grad_q)
    store_rows(p_grad_q + head * HEAD_DIM, o_row, m_row, row_stride, b_grad_q * scale, HEAD_DIM, BD)


@triton.jit(do_not_specialize=["max_seqlen_k", "capacity_q", "capacity_k"])
def grad_keys_kernel(
    p_grad_out,
    p_q,
    p_k,
    p_v,
    p_keep,
    p_lse,
    p_delta,
    p_grad_k,  # [capacity_k, HEADS, HEAD_DIM], contiguous, as is grad_v; both written for every listed key
    p_grad_v,
    p_grad_keep,  # fp32 [HEADS, capacity_k] or None, like p_keep
    p_cu_seqlens_q,
    p_cu_seqlens_k,
    max_seqlen_k,
    stride_q,
    stride_k,
    stride_v,
    head_stride_q,
    head_stride_k,
    head_stride_v,
    capacity_q,
    capacity_k,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dK, dV and the head's part of dkeep for a tile of keys. Grid: (sequence, key tile) x head."""
    head = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(max_seqlen_k, BN)
    sequence = tl.program_id(0) // tiles
    first, end = (
        tl.load(p_cu_seqlens_k + sequence) + tl.program_id(0) % tiles * BN,
        tl.load(p_cu_seqlens_k + sequence + 1),
    )
    if first >= end:
        return
    row_stride: tl.constexpr = HEADS * HEAD_DIM
    o_key = first + tl.arange(0, BN)
    m_key = o_key < end
    b_k = load_rows(p_k + head * head_stride_k, o_key, m_key, stride_k, HEAD_DIM, BD)
    b_v = load_rows(p_v + head * head_stride_v, o_key, m_key, stride_v, HEAD_DIM, BD)
    b_grad_k = tl.zeros((BN, BD), tl.float32)
    b_grad_v = tl.zeros((BN, BD), tl.float32)
    if p_keep is not None:
        b_keep = tl.load(p_keep + o_key, mask=m_key, other=0.0)
        b_grad_keep = tl.zeros((BN,), tl.float32)
    end_query = tl.load(p_cu_seqlens_q + sequence + 1)
    for start in range(tl.load(p_cu_seqlens_q + sequence), end_query, BM):
        o_row = start + tl.arange(0, BM)
        m_row = o_row < end_query
        b_q = load_rows(p_q + head * head_stride_q, o_row, m_row, stride_q, HEAD_DIM, BD)
        b_grad_out = load_rows(p_grad_out + head * HEAD_DIM, o_row, m_row, row_stride, HEAD_DIM, BD)
        b_lse = tl.load(p_lse + head * capacity_q + o_row, mask=m_row, other=float("-inf"))
        b_delta = tl.load(p_delta + head * capacity_q + o_row, mask=m_row, other=0.0)
        # Keys in rows: as P^T and not P is multiplied, nothing has to be transposed in registers.
        b_p = _unweighted(scores(b_k, b_q, scale / LN_2), b_lse[None, :])  # [BN, BM]; 0 behind the last query
        b_slope = products(b_v, b_grad_out) - b_delta[None, :]
        if p_keep is not None:
            b_grad_keep += tl.sum(b_p * b_slope, 1)
            b_p *= b_keep[:, None]
        b_grad_v = multiply_add(b_p.to(b_v.dtype), b_grad_out, b_grad_v)
        b_grad_k = multiply_add((b_p * b_slope).to(b_q.dtype), b_q, b_grad_k)
    store_rows(p_grad_k + head * HEAD_DIM, o_key, m_key, row_stride, b_grad_k * scale, HEAD_DIM, BD)
    store_rows(p_grad_v + head * HEAD_DIM, o_key, m_key, row_stride, b_grad_v, HEAD_DIM, BD)
    if p_keep is not None:
        tl.store(p_grad_keep + head * capacity_k + o_key, b_grad_keep, mask=m_key)
