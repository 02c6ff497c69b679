// Ragged attention, forward: out = softmax(scale q k^T, weighted by keep) v for every sequence and head.
//
// Bytes: q, k, v are read once, out and lse written once; scores live in L1 only. Layout: for one (sequence,
// head) the keys are packed transposed (keys along lanes) and the values row-major, both in fp32, so that
// both products are plain broadcasts times vectors and bf16 is widened once per key instead of once per
// score. A strip of kTileRows queries then goes through q k^T, softmax and p v while its scores [kTileRows,
// keys] stay in L1. Up to kKeyBlock keys (packed keys and values fit L2) the softmax is exact and single
// pass; beyond, blocks of keys are merged with the running maximum and sum of flash attention. The
// exponential is base 2, log2(e) being folded into the scale. A weight of zero becomes a score of -infinity
// before the maximum is taken, so a skimmed key with a large score cannot push the kept ones into underflow.
// One or two queries (the last layer needs only the first token's) would not repay packing: they take dot
// products straight from the rows of k.
#pragma once

#include <math.h>

#include "gemm.h"

namespace transkimmer::cpu::TRANSKIMMER_ISA {

constexpr int64_t kKeyBlock = 512;
constexpr int64_t kUnpackedQueries = 2;

// The operands of one (sequence, head), with row 0 the first row of the sequence.
template <typename T>
struct ForwardHead {
  const T *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;
  const float* keep;
  T* out;
  int64_t out_stride;
  float *lse, *importance;
  int64_t queries, keys, dim;
  float scale;
};

struct ForwardScratch {
  float *keys, *values, *query, *scores, *acc, *max, *sum;
};

inline int64_t key_block(int64_t keys, bool importance) {
  // Importance needs the final normaliser with the scores still at hand, hence all keys in one block.
  return importance ? keys : smaller(keys, kKeyBlock);
}

// Scores of `rows` queries turned into weights, in place, `stride` apart: raises max[r] to the row's maximum
// and sets sum[r] to the sum of its weights. Lanes beyond `keys` become zero. All maxima come before all
// exponentials, because a short row alone is nothing but latency: a reduction, an exponential and another
// reduction.
template <bool kWeighted>
void softmax_rows(float* scores, int64_t stride, int rows, int64_t keys, const float* keep, float* max_of,
                  float* sum_of) {
  const Vec none = set1(-INFINITY);
  const int64_t whole = keys / kLanes * kLanes;
  for (int r = 0; r < rows; ++r) {
    float* s = scores + r * stride;
    Vec m = set1(max_of[r]);
    for (int64_t j = 0; j < whole; j += kLanes) {
      Vec x = load(s + j);
      if (kWeighted) store(s + j, x = where_positive(load(keep + j), x, none));
      m = max(m, x);
    }
    if (whole < keys) {
      const int n = static_cast<int>(keys - whole);
      const Vec x = kWeighted ? where_positive(load_first(keep + whole, n), load(s + whole), none)
                              : first_or(load(s + whole), n, none);
      store(s + whole, x);
      m = max(m, x);
    }
    max_of[r] = max_lanes(m);
  }
  for (int r = 0; r < rows; ++r) {
    float* s = scores + r * stride;
    // Finite also where no key counts: every weight is then zero instead of NaN.
    const Vec shift = set1(max_of[r] == -INFINITY ? 0.0f : max_of[r]);
    Vec sum = zero();
    for (int64_t j = 0; j < keys; j += kLanes) {
      Vec p = exp2(sub(load(s + j), shift));
      if (kWeighted) p = mul(p, load_part(keep + j, keys - j));
      sum = add(sum, p);
      store(s + j, p);
    }
    sum_of[r] = sum_lanes(sum);
  }
}

inline void softmax(float* scores, int64_t stride, int rows, int64_t keys, const float* keep, float* max_of,
                    float* sum_of) {
  if (keep == nullptr) {
    softmax_rows<false>(scores, stride, rows, keys, keep, max_of, sum_of);
  } else {
    softmax_rows<true>(scores, stride, rows, keys, keep, max_of, sum_of);
  }
}

// 2^(a - b) for the merge of two blocks, 0 where a is the maximum of no key at all.
inline float merge_factor(float a, float b) { return a == -INFINITY ? 0.0f : exp2f(a - b); }

inline void add_scaled_row(float* dst, const float* src, int64_t n, float factor) {
  const Vec scale = set1(factor);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(dst + j, fma(load(src + j), scale, load(dst + j)));
  for (; j < n; ++j) dst[j] += factor * src[j];
}

// Output row, lse and importance of query i from its unnormalised sum.
template <typename T>
void finish_query(const ForwardHead<T>& h, int64_t i, const float* acc, const float* weights, float max,
                  float sum) {
  const float inverse = sum > 0.0f ? 1.0f / sum : (sum == 0.0f ? 0.0f : sum);  // a NaN must come through
  unpack_row(acc, h.dim, inverse, h.out + i * h.out_stride);
  if (h.lse != nullptr) h.lse[i] = sum == 0.0f ? -INFINITY : kLn2 * max + logf(sum);
  if (h.importance != nullptr) add_scaled_row(h.importance, weights, h.keys, inverse);
}

template <typename T>
void attend_packed(const ForwardHead<T>& h, const ForwardScratch& s) {
  const int64_t block = key_block(h.keys, h.importance != nullptr), width = padded(h.dim);
  const int64_t strips = strip_count(h.queries);
  for (int64_t key = 0; key < h.keys; key += block) {
    const int64_t n = smaller(h.keys - key, block), columns = padded(n);
    const bool first = key == 0, last = key + n == h.keys;
    const float* keep = h.keep == nullptr ? nullptr : h.keep + key;
    const RightOperand keys = pack_transposed(h.k + key * h.k_stride, h.k_stride, n, h.dim, s.keys);
    pack_rows(h.v + key * h.v_stride, h.v_stride, n, h.dim, 1.0f, s.values);
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t q = h.queries * strip / strips;
      const int rows = static_cast<int>(h.queries * (strip + 1) / strips - q);
      pack_rows(h.q + q * h.q_stride, h.q_stride, rows, h.dim, h.scale * kLog2E, s.query);
      gemm_strip<false>(rows, s.query, width, keys, h.dim, columns, s.scores, columns, false);
      // With a single block the accumulators of a strip are finished at once and stay in L1.
      const int64_t state = h.keys == block ? 0 : q;
      float *acc = s.acc + state * width, *max_of = s.max + state, *sum_of = s.sum + state;
      float old_max[kTileRows], old_sum[kTileRows];
      for (int r = 0; r < rows; ++r) {
        old_max[r] = first ? -INFINITY : max_of[r];
        old_sum[r] = first ? 0.0f : sum_of[r];
        max_of[r] = old_max[r];
      }
      softmax(s.scores, columns, rows, n, keep, max_of, sum_of);
      for (int r = 0; r < rows && !first; ++r) {
        const float factor = merge_factor(old_max[r], max_of[r]);
        pack_rows(acc + r * width, width, 1, width, factor, acc + r * width);
        sum_of[r] += old_sum[r] * factor;
      }
      gemm_strip<false>(rows, s.scores, columns, row_major(s.values, width), n, width, acc, width, !first);
      if (!last) continue;
      for (int r = 0; r < rows; ++r) {
        finish_query(h, q + r, acc + r * width, s.scores + r * columns, max_of[r], sum_of[r]);
      }
    }
  }
}

// q . k_j for kLanes keys j: one accumulator per key, summed across lanes by a transposition.
template <typename T>
Vec dot_products(const float* q, const T* k, int64_t k_stride, int64_t keys, int64_t dim) {
  const int64_t whole = dim / kLanes * kLanes;
  Vec acc[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    acc[r] = zero();
    if (r >= keys) continue;
    const T* row = k + r * k_stride;
    for (int64_t j = 0; j < whole; j += kLanes) acc[r] = fma(load(q + j), load(row + j), acc[r]);
    if (whole < dim) {
      acc[r] = fma(load(q + whole), load_first(row + whole, static_cast<int>(dim - whole)), acc[r]);
    }
  }
  transpose(acc);
  for (int stride = 1; stride < kLanes; stride *= 2) {
    for (int r = 0; r < kLanes; r += 2 * stride) acc[r] = add(acc[r], acc[r + stride]);
  }
  return acc[0];
}

// acc[0, kVecs * kLanes) = sum over keys of weight times a vector column of v.
template <int kVecs, typename T>
void weighted_columns(const float* weights, const T* v, int64_t v_stride, int64_t keys, float* acc) {
  Vec sum[kVecs];
  for (int c = 0; c < kVecs; ++c) sum[c] = zero();
  for (int64_t j = 0; j < keys; ++j) {
    for (int c = 0; c < kVecs; ++c)
      sum[c] = fma(set1(weights[j]), load(v + j * v_stride + c * kLanes), sum[c]);
  }
  for (int c = 0; c < kVecs; ++c) store(acc + c * kLanes, sum[c]);
}

template <typename T>
void weighted_last_columns(const float* weights, const T* v, int64_t v_stride, int64_t keys, int columns,
                           float* acc) {
  Vec sum = zero();
  for (int64_t j = 0; j < keys; ++j) sum = fma(set1(weights[j]), load_first(v + j * v_stride, columns), sum);
  store(acc, sum);
}

template <typename T>
void attend_unpacked(const ForwardHead<T>& h, const ForwardScratch& s) {
  const int64_t whole = h.dim / kLanes * kLanes;
  for (int64_t i = 0; i < h.queries; ++i) {
    pack_rows(h.q + i * h.q_stride, h.q_stride, 1, h.dim, h.scale * kLog2E, s.query);
    for (int64_t j = 0; j < h.keys; j += kLanes) {
      store(s.scores + j, dot_products(s.query, h.k + j * h.k_stride, h.k_stride, h.keys - j, h.dim));
    }
    float max_of = -INFINITY, sum_of;
    softmax(s.scores, 0, 1, h.keys, h.keep, &max_of, &sum_of);
    int64_t c = 0;
    for (; c + 4 * kLanes <= whole; c += 4 * kLanes) {
      weighted_columns<4>(s.scores, h.v + c, h.v_stride, h.keys, s.acc + c);
    }
    for (; c < whole; c += kLanes) weighted_columns<1>(s.scores, h.v + c, h.v_stride, h.keys, s.acc + c);
    if (c < h.dim) {
      weighted_last_columns(s.scores, h.v + c, h.v_stride, h.keys, static_cast<int>(h.dim - c), s.acc + c);
    }
    finish_query(h, i, s.acc, s.scores, max_of, sum_of);
  }
}

inline ForwardScratch carve_forward(Carver& carver, int64_t dim, int64_t queries, int64_t keys,
                                    bool importance) {
  const int64_t width = padded(dim), block = key_block(keys, importance);
  // Never fewer than a tile: what is taken for the most queries and keys must do for any of fewer.
  const int64_t state = block < keys && queries > kTileRows ? queries : kTileRows;
  ForwardScratch s;
  s.keys = carver.take(transposed_floats(block, dim));
  s.values = carver.take(block * width);
  s.query = carver.take(kTileRows * width);
  const int64_t strip = kTileRows * padded(block), row = padded(keys);  // the row is for unpacked queries
  s.scores = carver.take(strip > row ? strip : row);
  s.acc = carver.take(state * width);
  s.max = carver.take(state);
  s.sum = carver.take(state);
  return s;
}

inline int64_t attention_forward_scratch(const AttentionShape& shape, int64_t max_queries, int64_t max_keys,
                                         bool importance) {
  Carver carver{nullptr};
  carve_forward(carver, shape.head_dim, max_queries, max_keys, importance);
  return carver.used;
}

template <typename T>
void attention_forward(const AttentionForwardArgs& args, const AttentionPiece& piece, float* scratch) {
  const AttentionShape& shape = args.shape;
  const int64_t q0 = shape.cu_seqlens_q[piece.sequence] + piece.query_begin;
  const int64_t k0 = shape.cu_seqlens_k[piece.sequence];
  ForwardHead<T> h;
  h.queries = piece.query_end - piece.query_begin;
  h.keys = shape.cu_seqlens_k[piece.sequence + 1] - k0;
  h.dim = shape.head_dim;
  h.scale = shape.scale;
  h.keep = args.keep == nullptr ? nullptr : args.keep + k0;
  h.q_stride = args.q.row_stride, h.k_stride = args.k.row_stride, h.v_stride = args.v.row_stride;
  h.out_stride = shape.heads * shape.head_dim;

  Carver carver{scratch};
  const ForwardScratch s = carve_forward(carver, h.dim, h.queries, h.keys, args.importance != nullptr);
  for (int64_t head = piece.head_begin; head < piece.head_end; ++head) {
    h.q = static_cast<const T*>(args.q.data) + q0 * args.q.row_stride + head * args.q.head_stride;
    h.k = static_cast<const T*>(args.k.data) + k0 * args.k.row_stride + head * args.k.head_stride;
    h.v = static_cast<const T*>(args.v.data) + k0 * args.v.row_stride + head * args.v.head_stride;
    h.out = static_cast<T*>(args.out) + q0 * h.out_stride + head * h.dim;
    h.lse = args.lse == nullptr ? nullptr : args.lse + head * shape.capacity_q + q0;
    h.importance = args.importance == nullptr ? nullptr : args.importance + head * shape.capacity_k + k0;
    for (int64_t j = 0; h.importance != nullptr && j < h.keys; ++j) h.importance[j] = 0.0f;
    if (h.queries <= kUnpackedQueries || h.keys == 0) {
      attend_unpacked(h, s);
    } else {
      attend_packed(h, s);
    }
  }
}

// out[j] = partial[0][j] + partial[1][j] + ..., for j in [begin, end).
inline void sum_heads(const float* partial, int64_t heads, int64_t capacity, int64_t begin, int64_t end,
                      float* out) {
  for (int64_t j = begin; j < end; ++j) {
    float sum = 0.0f;
    for (int64_t head = 0; head < heads; ++head) sum += partial[head * capacity + j];
    out[j] = sum;
  }
}

}  // namespace transkimmer::cpu::TRANSKIMMER_ISA
