// Ragged attention, backward: gradients of q, k, v and of the keep weights, for every sequence and head.
//
// The probabilities are recomputed from lse. Bytes: q, k, v, out and their gradients cross memory once.
// Layout: keys and values of one (sequence, head) are packed twice, transposed (for q k^T and dO v^T) and
// row-major (for dS k); queries go through in blocks of kQueryBlock rows, whose P and dS [kQueryBlock, keys]
// stay in L2, and the contributions to dk and dv accumulate in fp32 beside them. All five products run on the
// tile of gemm.h. Every sum has a fixed order and one owner, so the result is deterministic; the gradient of
// the keep weights is written per head and summed over heads by the caller.
#pragma once

#include <math.h>

#include "gemm.h"

namespace transkimmer::cpu::TRANSKIMMER_ISA {

constexpr int64_t kQueryBlock = 48;
// A skimmed key is outside the normaliser, so its exponent S - lse has no bound of its own.
constexpr float kMaxExponent = 80.0f;

struct BackwardScratch {
  float *keys_t, *values_t, *keys;            // operands of one head
  float *query, *grad_out, *scores, *grad_p;  // one block of queries
  float *grad_k, *grad_v, *grad_keep;         // accumulators of one head
};

// In: scores q k^T and grad_p = dO v^T. Out: scores = P, grad_p = scale dS; adds to grad_keep. `delta` = dO .
// O.
inline void grad_scores_row(float* scores, float* grad_p, float* grad_keep, const float* keep, int64_t keys,
                            float scale, float lse, float delta) {
  const Vec factor = set1(scale * kLog2E), limit = set1(kMaxExponent * kLog2E), row_delta = set1(delta);
  // A row without any key has no probabilities; 2^-infinity makes them zero.
  const Vec shift = set1(lse == -INFINITY ? -INFINITY : -lse * kLog2E);
  for (int64_t j = 0; j < keys; j += kLanes) {
    const Vec e = exp2(min(limit, fma(load(scores + j), factor, shift)));
    const Vec grad = sub(load(grad_p + j), row_delta);
    Vec p = e;
    if (keep != nullptr) {
      p = mul(e, load_part(keep + j, keys - j));
      store(grad_keep + j, fma(e, grad, load(grad_keep + j)));
    }
    store(scores + j, p);
    store(grad_p + j, mul(mul(p, grad), set1(scale)));
  }
}

template <typename T>
float dot_with_packed(const float* packed, const T* x, int64_t n) {
  const int64_t whole = n / kLanes * kLanes;
  Vec sum = zero();
  for (int64_t j = 0; j < whole; j += kLanes) sum = fma(load(packed + j), load(x + j), sum);
  if (whole < n) sum = fma(load(packed + whole), load_first(x + whole, static_cast<int>(n - whole)), sum);
  return sum_lanes(sum);
}

template <typename T>
struct BackwardHead {
  const T *grad_out, *q, *k, *v, *out;
  int64_t grad_out_stride, q_stride, k_stride, v_stride, out_stride;
  const float *lse, *keep;
  T *grad_q, *grad_k, *grad_v;
  float* grad_keep;
  int64_t grad_stride;
  int64_t queries, keys, dim;
  float scale;
};

template <typename T>
void attend_backward(const BackwardHead<T>& h, const BackwardScratch& s) {
  const int64_t width = padded(h.dim), columns = padded(h.keys);
  const RightOperand keys_t = pack_transposed(h.k, h.k_stride, h.keys, h.dim, s.keys_t);
  const RightOperand values_t = pack_transposed(h.v, h.v_stride, h.keys, h.dim, s.values_t);
  pack_rows(h.k, h.k_stride, h.keys, h.dim, 1.0f, s.keys);
  const int64_t sums = h.queries == 0 ? h.keys * width : 0;  // otherwise the first block overwrites them
  for (int64_t j = 0; j < sums; ++j) s.grad_k[j] = s.grad_v[j] = 0.0f;
  for (int64_t j = 0; j < columns; ++j) s.grad_keep[j] = 0.0f;

  for (int64_t q = 0; q < h.queries; q += kQueryBlock) {
    const int64_t rows = smaller(h.queries - q, kQueryBlock);
    pack_rows(h.q + q * h.q_stride, h.q_stride, rows, h.dim, 1.0f, s.query);
    pack_rows(h.grad_out + q * h.grad_out_stride, h.grad_out_stride, rows, h.dim, 1.0f, s.grad_out);
    gemm<false>(rows, s.query, width, keys_t, h.dim, columns, s.scores, columns, false);
    gemm<false>(rows, s.grad_out, width, values_t, h.dim, columns, s.grad_p, columns, false);
    for (int64_t r = 0; r < rows; ++r) {
      const float delta = dot_with_packed(s.grad_out + r * width, h.out + (q + r) * h.out_stride, h.dim);
      grad_scores_row(s.scores + r * columns, s.grad_p + r * columns, s.grad_keep, h.keep, h.keys, h.scale,
                      h.lse[q + r], delta);
    }
    const bool accumulate = q > 0;
    gemm<true>(h.keys, s.scores, columns, row_major(s.grad_out, width), rows, width, s.grad_v, width,
               accumulate);
    gemm<true>(h.keys, s.grad_p, columns, row_major(s.query, width), rows, width, s.grad_k, width,
               accumulate);
    // The packed queries are used up: their place takes dq.
    gemm<false>(rows, s.grad_p, columns, row_major(s.keys, width), h.keys, width, s.query, width, false);
    for (int64_t r = 0; r < rows; ++r) {
      unpack_row(s.query + r * width, h.dim, 1.0f, h.grad_q + (q + r) * h.grad_stride);
    }
  }
  for (int64_t j = 0; j < h.keys; ++j) {
    unpack_row(s.grad_k + j * width, h.dim, 1.0f, h.grad_k + j * h.grad_stride);
    unpack_row(s.grad_v + j * width, h.dim, 1.0f, h.grad_v + j * h.grad_stride);
    if (h.grad_keep != nullptr) h.grad_keep[j] = s.grad_keep[j];
  }
}

inline BackwardScratch carve_backward(Carver& carver, int64_t dim, int64_t keys) {
  const int64_t width = padded(dim), columns = padded(keys);
  BackwardScratch s;
  s.keys_t = carver.take(transposed_floats(keys, dim));
  s.values_t = carver.take(transposed_floats(keys, dim));
  s.keys = carver.take(keys * width);
  s.query = carver.take(kQueryBlock * width);
  s.grad_out = carver.take(kQueryBlock * width);
  s.scores = carver.take(kQueryBlock * columns);
  s.grad_p = carver.take(kQueryBlock * columns);
  s.grad_k = carver.take(keys * width);
  s.grad_v = carver.take(keys * width);
  s.grad_keep = carver.take(columns);
  return s;
}

inline int64_t attention_backward_scratch(const AttentionShape& shape, int64_t max_keys) {
  Carver carver{nullptr};
  carve_backward(carver, shape.head_dim, max_keys);
  return carver.used;
}

template <typename T>
void attention_backward(const AttentionBackwardArgs& args, const AttentionPiece& piece, float* scratch) {
  const AttentionShape& shape = args.shape;
  const int64_t q0 = shape.cu_seqlens_q[piece.sequence], k0 = shape.cu_seqlens_k[piece.sequence];
  const auto rows = [](const HeadView& view, int64_t row, int64_t head) {
    return static_cast<const T*>(view.data) + row * view.row_stride + head * view.head_stride;
  };
  BackwardHead<T> h;
  h.queries = shape.cu_seqlens_q[piece.sequence + 1] - q0;
  h.keys = shape.cu_seqlens_k[piece.sequence + 1] - k0;
  h.dim = shape.head_dim;
  h.scale = shape.scale;
  h.keep = args.keep == nullptr ? nullptr : args.keep + k0;
  h.grad_out_stride = args.grad_out.row_stride, h.out_stride = args.out.row_stride;
  h.q_stride = args.q.row_stride, h.k_stride = args.k.row_stride, h.v_stride = args.v.row_stride;
  h.grad_stride = shape.heads * shape.head_dim;
  Carver carver{scratch};
  const BackwardScratch s = carve_backward(carver, h.dim, h.keys);
  for (int64_t head = piece.head_begin; head < piece.head_end; ++head) {
    h.grad_out = rows(args.grad_out, q0, head);
    h.out = rows(args.out, q0, head);
    h.q = rows(args.q, q0, head);
    h.k = rows(args.k, k0, head);
    h.v = rows(args.v, k0, head);
    h.lse = args.lse + head * shape.capacity_q + q0;
    h.grad_q = static_cast<T*>(args.grad_q) + q0 * h.grad_stride + head * h.dim;
    h.grad_k = static_cast<T*>(args.grad_k) + k0 * h.grad_stride + head * h.dim;
    h.grad_v = static_cast<T*>(args.grad_v) + k0 * h.grad_stride + head * h.dim;
    h.grad_keep = args.grad_keep == nullptr ? nullptr : args.grad_keep + head * shape.capacity_k + k0;
    attend_backward(h, s);
  }
}

}  // namespace transkimmer::cpu::TRANSKIMMER_ISA
