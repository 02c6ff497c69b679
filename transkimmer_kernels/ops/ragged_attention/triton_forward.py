"""Kernels of `ragged_attention`, forwards: softmax(q k^T) v inside each sequence, and the column sums of P.

A tile is BM consecutive queries of one head. Keys and values pass by in blocks of BN with a running maximum and sum per
query (online softmax, Milakov and Gimelshein, 2018), so scores live in registers only. Moved per tile: its queries and
results once, keys and values of its sequences once; per query and key 4 HEAD_DIM FLOPs.

Tiles are cut in one of two ways, and the device chooses, because after some layers of skimming only it knows the
lengths:

* aligned: a tile lies in one sequence. Right for long sequences; with 5 tokens in it, a tile of 64 is mostly empty.
* packed: a tile takes the next BM queries of the list, whatever sequences they are from. A query sees the keys of its
  own sequence only (a block-diagonal mask), and the tile walks over the keys of all its sequences. Where sequences are
  short, tiles are full, and there are few of them.

Programs stay on the device and walk the tiles, heads first: neither the number of tiles nor the way they are cut is
known when the grid is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_blocks import lower_bound, multiply_add

LN_2 = tl.constexpr(0.6931471805599453)
_NO_KEY = tl.constexpr(2**31 - 1)


@triton.jit
def load_rows(p_x, o_row, m_row, stride, HEAD_DIM: tl.constexpr, BD: tl.constexpr):
    """Rows [R, BD] of one head; 0 where the mask is false and in columns from HEAD_DIM on."""
    o_d = tl.arange(0, BD)
    m_x = m_row[:, None]
    if HEAD_DIM != BD:
        m_x = m_x & (o_d < HEAD_DIM)[None, :]
    return tl.load(p_x + o_row.to(tl.int64)[:, None] * stride + o_d[None, :], mask=m_x, other=0.0)


@triton.jit
def store_rows(p_x, o_row, m_row, stride, b_x, HEAD_DIM: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD)
    m_x = m_row[:, None]
    if HEAD_DIM != BD:
        m_x = m_x & (o_d < HEAD_DIM)[None, :]
    p_row = p_x + o_row.to(tl.int64)[:, None] * stride + o_d[None, :]
    tl.store(p_row, b_x.to(p_x.dtype.element_ty), mask=m_x)


@triton.jit
def products(b_a, b_b):
    """a @ b^T [M, N] of rows [M, BD] and [N, BD]."""
    return multiply_add(b_a, b_b.T, tl.zeros((b_a.shape[0], b_b.shape[0]), tl.float32))


@triton.jit
def scores(b_a, b_b, scale):
    """[M, N] scores of queries with keys, or of keys with queries, in units of log 2: exp2 of them is exp(S).

    An additive bias that depends on the two positions would be added here, and nowhere else.
    """
    return products(b_a, b_b) * scale


@triton.jit
def log_weights(p_keep, o_key, m_key):
    """Logarithms [N] of the keys' weights, to the base 2; -inf takes a key out."""
    return tl.log2(tl.load(p_keep + o_key, mask=m_key, other=1.0))


@triton.jit
def _add_keys(
    b_max, b_sum, b_acc, b_q, p_k, p_v, p_keep, stride_k, stride_v, scale, b_begin, b_end, start, readable, end,
    HEAD_DIM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys [start, start + BN), of which those in [readable, end) are read."""
    o_key = start + tl.arange(0, BN)
    m_key = (o_key >= readable) & (o_key < end)
    b_k = load_rows(p_k, o_key, m_key, stride_k, HEAD_DIM, BD)  # [BN, BD]
    b_s = scores(b_q, b_k, scale)  # [BM, BN]
    if p_keep is not None:
        b_s += log_weights(p_keep, o_key, m_key)[None, :]
    # A key that is another sequence's, or none at all, becomes exactly 0, were it NaN.
    b_s = tl.where((o_key[None, :] >= b_begin[:, None]) & (o_key[None, :] < b_end[:, None]), b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new)  # no key yet: -inf - -inf would be NaN
    b_p = tl.exp2(b_s - b_base[:, None])
    b_fade = tl.exp2(b_max - b_base)
    b_v = load_rows(p_v, o_key, m_key, stride_v, HEAD_DIM, BD)
    b_acc = multiply_add(b_p.to(b_v.dtype), b_v, b_acc * b_fade[:, None])
    return b_new, b_sum * b_fade + tl.sum(b_p, 1), b_acc, b_p


@triton.jit
def _attend(
    b_q, p_k, p_v, p_keep, stride_k, stride_v, scale, b_begin, b_end, first_key, end_key, readable, readable_end,
    HEAD_DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Queries [BM, BD] with keys [begin, end) of their own -> out [BM, BD] in fp32, lse [BM] and the last P [BM, BN].

    WHOLE: all keys of the tile are one block, so that P is all of P.
    """
    b_max = tl.full((BM,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BM,), tl.float32)
    b_acc = tl.zeros((BM, BD), tl.float32)
    if WHOLE:
        b_max, b_sum, b_acc, b_p = _add_keys(
            b_max, b_sum, b_acc, b_q, p_k, p_v, p_keep, stride_k, stride_v, scale, b_begin, b_end,
            first_key, readable, readable_end, HEAD_DIM, BN, BD,
        )  # fmt: skip
    else:
        b_p = tl.zeros((BM, BN), tl.float32)
        for start in range(first_key, end_key, BN):
            b_max, b_sum, b_acc, _ = _add_keys(
                b_max, b_sum, b_acc, b_q, p_k, p_v, p_keep, stride_k, stride_v, scale, b_begin, b_end,
                start, readable, readable_end, HEAD_DIM, BN, BD,
            )  # fmt: skip
    b_whole = tl.where(b_sum == 0, 1.0, b_sum)  # a query without a key: 0, and lse = -inf by itself
    return b_acc / b_whole[:, None], (b_max + tl.log2(b_whole)) * LN_2, b_p / b_whole[:, None]


@triton.jit
def _aligned_tile(
    tile, head, p_q, p_k, p_v, p_keep, p_out, p_lse, p_importance, p_cu_seqlens_q, p_cu_seqlens_k, max_seqlen_q,
    stride_q, stride_k, stride_v, capacity_q, capacity_k, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Up to BM queries of one sequence; with importance all of them, and all keys, which then fit one block.

    tile: int64, since a bound on lengths that is too high makes more tiles than there are tokens.
    """
    sequence = (tile // tl.cdiv(max_seqlen_q, BM)).to(tl.int32)
    first = tl.load(p_cu_seqlens_q + sequence) + (tile % tl.cdiv(max_seqlen_q, BM)).to(tl.int32) * BM
    end = tl.load(p_cu_seqlens_q + sequence + 1)
    begin_key, end_key = tl.load(p_cu_seqlens_k + sequence), tl.load(p_cu_seqlens_k + sequence + 1)
    WHOLE: tl.constexpr = p_importance is not None
    if first < end or WHOLE:
        o_row = first + tl.arange(0, BM)
        m_row = o_row < end
        b_q = load_rows(p_q, o_row, m_row, stride_q, HEAD_DIM, BD)
        b_begin = tl.full((BM,), 0, tl.int32) + begin_key
        b_end = tl.where(m_row, end_key, begin_key)
        b_out, b_lse, b_p = _attend(
            b_q, p_k, p_v, p_keep, stride_k, stride_v, scale, b_begin, b_end, begin_key, end_key,
            begin_key, end_key, HEAD_DIM, BM, BN, BD, WHOLE,
        )  # fmt: skip
        store_rows(p_out, o_row, m_row, HEADS * HEAD_DIM, b_out, HEAD_DIM, BD)
        tl.store(p_lse + head * capacity_q + o_row, b_lse, mask=m_row)
        if WHOLE:
            o_key = begin_key + tl.arange(0, BN)
            tl.store(p_importance + head * capacity_k + o_key, tl.sum(b_p, 0), mask=o_key < end_key)


@triton.jit
def _packed_tile(
    tile, head, p_q, p_k, p_v, p_keep, p_out, p_lse, p_cu_seqlens_q, p_cu_seqlens_k, batch, count_q,
    stride_q, stride_k, stride_v, capacity_q, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The tile's BM queries of the list, whatever sequences they are from."""
    o_row = tile * BM + tl.arange(0, BM)
    m_row = o_row < count_q
    b_q = load_rows(p_q, o_row, m_row, stride_q, HEAD_DIM, BD)
    # The sequence of a query begins at the last offset that is not behind it.
    b_sequence = tl.where(m_row, lower_bound(p_cu_seqlens_q, batch, o_row + 1) - 1, 0)
    b_begin = tl.load(p_cu_seqlens_k + b_sequence, mask=m_row, other=0)
    b_end = tl.load(p_cu_seqlens_k + b_sequence + 1, mask=m_row, other=0)
    first_key, end_key = tl.min(tl.where(m_row, b_begin, _NO_KEY)), tl.max(b_end)
    readable, readable_end = first_key, end_key

    # A NaN or an infinity among the values of one sequence would reach the others as 0 * NaN. That is rare, and seen in
    # the result: then each sequence gets a turn of its own, in which no other's values are read. Its bits are those of
    # a turn for all, since the blocks of keys are the same and what is left out had been 0.
    first_sequence, last_sequence = tl.min(tl.where(m_row, b_sequence, batch)), tl.max(b_sequence)
    turn, turn_end = first_sequence, last_sequence  # the sequences whose turn it is: at first, all of them
    while turn <= last_sequence:
        b_out, b_lse, _ = _attend(
            b_q, p_k, p_v, p_keep, stride_k, stride_v, scale, b_begin, b_end, first_key, end_key,
            readable, readable_end, HEAD_DIM, BM, BN, BD, False,
        )  # fmt: skip
        m_turn = m_row & (b_sequence >= turn) & (b_sequence <= turn_end)
        store_rows(p_out, o_row, m_turn, HEADS * HEAD_DIM, b_out, HEAD_DIM, BD)
        tl.store(p_lse + head * capacity_q + o_row, b_lse, mask=m_turn)
        broken = tl.max(tl.max(tl.where(m_row[:, None] & (b_out != b_out), 1, 0), 1))
        again = (turn_end > turn) & (broken != 0)
        turn = tl.where(again, turn, turn_end + 1)  # the first sequence by itself, or the next one
        turn_end = tl.where(again, turn, turn_end + 1)
        if turn <= last_sequence:
            readable, readable_end = tl.load(p_cu_seqlens_k + turn), tl.load(p_cu_seqlens_k + turn + 1)


@triton.jit(do_not_specialize=["batch", "max_seqlen_q", "capacity_q", "capacity_k"])
def attention_kernel(
    p_q,  # [capacity_q, HEADS, HEAD_DIM], as are k and v; the last dimension is contiguous
    p_k,
    p_v,
    p_keep,  # fp32 [capacity_k] or None
    p_out,  # [capacity_q, HEADS, HEAD_DIM], contiguous
    p_lse,  # fp32 [HEADS, capacity_q]
    p_importance,  # fp32 [HEADS, capacity_k] or None; only if every sequence fits one aligned tile
    p_cu_seqlens_q,  # int32 [batch + 1], as is the next
    p_cu_seqlens_k,
    batch,
    max_seqlen_q,
    stride_q,  # of a row, in elements
    stride_k,
    stride_v,
    head_stride_q,
    head_stride_k,
    head_stride_v,
    capacity_q,
    capacity_k,
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BD: tl.constexpr,  # HEAD_DIM rounded up to a power of two
    SHORT: tl.constexpr,  # mean number of keys up to which tiles are packed
    BM: tl.constexpr,
    BN: tl.constexpr,
    PACKED_M: tl.constexpr,
    PACKED_N: tl.constexpr,
):
    """out = softmax(scale q k^T + log keep) v and its statistics, tile by tile; see the head of this file."""
    count_q, count_k = tl.load(p_cu_seqlens_q + batch), tl.load(p_cu_seqlens_k + batch)
    # Few queries with many keys each (the last layer, of which a head reads the first tokens) do not pack: one tile
    # would walk over the keys of dozens of sequences.
    packed = (count_k <= batch.to(tl.int64) * SHORT) & (count_k <= 2 * count_q.to(tl.int64))
    if p_importance is not None:
        packed = False
    tiles = tl.cdiv(count_q, PACKED_M).to(tl.int64) if packed else batch.to(tl.int64) * tl.cdiv(max_seqlen_q, BM)
    work = tl.program_id(0).to(tl.int64)
    while work < tiles * HEADS:
        head, tile = work % HEADS, work // HEADS
        p_q_head, p_k_head, p_v_head = (
            p_q + head * head_stride_q,
            p_k + head * head_stride_k,
            p_v + head * head_stride_v,
        )
        p_out_head = p_out + head * HEAD_DIM
        if packed:
            _packed_tile(
                tile.to(tl.int32), head, p_q_head, p_k_head, p_v_head, p_keep, p_out_head, p_lse, p_cu_seqlens_q,
                p_cu_seqlens_k, batch, count_q, stride_q, stride_k, stride_v, capacity_q, scale,
                HEADS, HEAD_DIM, PACKED_M, PACKED_N, BD,
            )  # fmt: skip
        else:
            _aligned_tile(
                tile, head, p_q_head, p_k_head, p_v_head, p_keep, p_out_head, p_lse, p_importance, p_cu_seqlens_q,
                p_cu_seqlens_k, max_seqlen_q, stride_q, stride_k, stride_v, capacity_q, capacity_k, scale,
                HEADS, HEAD_DIM, BM, BN, BD,
            )  # fmt: skip
        work += tl.num_programs(0)


@triton.jit(do_not_specialize=["max_seqlen_k", "capacity_q", "capacity_k"])
def importance_kernel(
    p_q,
    p_k,
    p_keep,
    p_lse,
    p_importance,  # fp32 [HEADS, capacity_k], written for every listed key
    p_cu_seqlens_q,
    p_cu_seqlens_k,
    max_seqlen_k,
    stride_q,
    stride_k,
    head_stride_q,
    head_stride_k,
    capacity_q,
    capacity_k,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """importance[h, j] = sum over the queries of P_ij, once lse is known. Grid: (sequence, key tile) x head.

    Keys and queries again, no values: half of the attention's FLOPs. Each sum belongs to one program, which adds it up
    in a fixed order.
    """
    head = tl.program_id(1).to(tl.int64)
    sequence, tile = tl.program_id(0) // tl.cdiv(max_seqlen_k, BN), tl.program_id(0) % tl.cdiv(max_seqlen_k, BN)
    first, end = tl.load(p_cu_seqlens_k + sequence) + tile * BN, tl.load(p_cu_seqlens_k + sequence + 1)
    if first >= end:
        return
    o_key = first + tl.arange(0, BN)
    m_key = o_key < end
    b_k = load_rows(p_k + head * head_stride_k, o_key, m_key, stride_k, HEAD_DIM, BD)
    b_total = tl.zeros((BN,), tl.float32)
    b_log_weight = tl.zeros((BN,), tl.float32)
    if p_keep is not None:
        b_log_weight = log_weights(p_keep, o_key, m_key)
    end_query = tl.load(p_cu_seqlens_q + sequence + 1)
    for start in range(tl.load(p_cu_seqlens_q + sequence), end_query, BM):
        o_row = start + tl.arange(0, BM)
        m_row = o_row < end_query
        b_q = load_rows(p_q + head * head_stride_q, o_row, m_row, stride_q, HEAD_DIM, BD)
        b_lse = tl.load(p_lse + head * capacity_q + o_row, mask=m_row, other=float("-inf"))
        b_p = tl.exp2(scores(b_k, b_q, scale) + b_log_weight[:, None] - b_lse[None, :] / LN_2)  # [BN, BM]
        b_total += tl.sum(tl.where(b_lse[None, :] == float("-inf"), 0.0, b_p), 1)
    tl.store(p_importance + head * capacity_k + o_key, b_total, mask=m_key)
