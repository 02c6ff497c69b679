// Row-wise LayerNorm with what surrounds it fused in: an indexed read, a sum of up to three rows, an indexed
// write, or GELU and a dot product (the end of the skim predictor).
//
// Bytes: each row is read once and written once. A row is widened to fp32 into a buffer that stays in L1;
// mean and variance are taken from that buffer in two passes, so the variance has no cancellation, and the
// row is complete there before any of it is written, so the output may overwrite an operand.
#pragma once

#include <math.h>

#include "vec_math.h"

namespace transkimmer::cpu::TRANSKIMMER_ISA {

struct RowStatistics {
  float mean, inverse_deviation;
};

// Calls body(j, lane) for every whole vector of a row, four at a time: `lane` becomes a constant and names
// one of four independent accumulators, which hides the latency of adding. Returns the start of the partial
// vector, if any.
template <typename Body>
inline int64_t for_whole_vectors(int64_t dim, const Body& body) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= dim; j += 4 * kLanes) {
    body(j, 0);
    body(j + kLanes, 1);
    body(j + 2 * kLanes, 2);
    body(j + 3 * kLanes, 3);
  }
  for (; j + kLanes <= dim; j += kLanes) body(j, 0);
  return j;
}

struct Accumulators {
  Vec part[4] = {zero(), zero(), zero(), zero()};
  float total() const { return sum_lanes(add(add(part[0], part[1]), add(part[2], part[3]))); }
};

// Widens the sum of some rows into `row`, zeros behind it, and returns its statistics.
template <int kOperands, typename T>
RowStatistics load_row(const T* const (&x)[kOperands], int64_t dim, float eps, float* row) {
  Accumulators sum, squares;
  const int64_t whole = for_whole_vectors(dim, [&](int64_t j, int lane) __attribute__((always_inline)) {
    Vec value = load(x[0] + j);
    for (int i = 1; i < kOperands; ++i) value = add(value, load(x[i] + j));
    store(row + j, value);
    sum.part[lane] = add(sum.part[lane], value);
  });
  const int left = static_cast<int>(dim - whole);
  if (left > 0) {
    Vec value = load_first(x[0] + whole, left);
    for (int i = 1; i < kOperands; ++i) value = add(value, load_first(x[i] + whole, left));
    store(row + whole, value);
    sum.part[0] = add(sum.part[0], value);
  }
  const float mean = sum.total() / static_cast<float>(dim);
  for_whole_vectors(dim, [&](int64_t j, int lane) __attribute__((always_inline)) {
    const Vec centred = sub(load(row + j), set1(mean));
    squares.part[lane] = fma(centred, centred, squares.part[lane]);
  });
  if (left > 0) {
    const Vec centred = first_or(sub(load(row + whole), set1(mean)), left, zero());
    squares.part[0] = fma(centred, centred, squares.part[0]);
  }
  const float variance = squares.total() / static_cast<float>(dim);
  return {mean, 1.0f / sqrtf(variance + eps)};
}

template <typename T>
inline Vec normalise(const float* row, int64_t j, int64_t dim, RowStatistics stats, const T* weight,
                     const T* bias) {
  const Vec centred = mul(sub(load(row + j), set1(stats.mean)), set1(stats.inverse_deviation));
  return fma(centred, load_part(weight + j, dim - j), load_part(bias + j, dim - j));
}

inline int64_t norm_scratch(int64_t dim) { return dim + kLanes; }

template <typename T>
const T* indexed_row(const void* data, const int32_t* index, int64_t i, int64_t dim) {
  return static_cast<const T*>(data) + (index == nullptr ? i : index[i]) * dim;
}

template <int kOperands, typename T>
void norm_sums(const NormArgs& args, int64_t begin, int64_t end, float* row) {
  const int64_t dim = args.dim, whole = dim / kLanes * kLanes;
  const T *weight = static_cast<const T*>(args.weight), *bias = static_cast<const T*>(args.bias);
  for (int64_t i = begin; i < end; ++i) {
    const T* x[kOperands] = {indexed_row<T>(args.x, args.x_index, i, dim)};
    if constexpr (kOperands > 1) x[1] = indexed_row<T>(args.residual, args.residual_index, i, dim);
    if constexpr (kOperands > 2) x[2] = indexed_row<T>(args.addend, args.addend_index, i, dim);
    const RowStatistics stats = load_row(x, dim, args.eps, row);
    T* out = static_cast<T*>(args.out) + (args.out_index == nullptr ? i : args.out_index[i]) * dim;
    for_whole_vectors(dim, [&](int64_t j, int) __attribute__((always_inline)) {
      store(out + j, normalise(row, j, dim, stats, weight, bias));
    });
    if (whole < dim) {
      store_first(out + whole, normalise(row, whole, dim, stats, weight, bias),
                  static_cast<int>(dim - whole));
    }
  }
}

template <typename T>
void norm_rows(const NormArgs& args, int64_t begin, int64_t end, float* row) {
  if (args.residual == nullptr) return norm_sums<1, T>(args, begin, end, row);
  if (args.addend == nullptr) return norm_sums<2, T>(args, begin, end, row);
  norm_sums<3, T>(args, begin, end, row);
}

template <typename T>
void norm_gelu_dot(const GeluDotArgs& args, int64_t begin, int64_t end, float* row) {
  const NormArgs& norm = args.norm;
  const T *weight = static_cast<const T*>(norm.weight), *bias = static_cast<const T*>(norm.bias);
  const T* out_weight = static_cast<const T*>(args.out_weight);
  for (int64_t i = begin; i < end; ++i) {
    const T* const x[] = {indexed_row<T>(norm.x, norm.x_index, i, norm.dim)};
    const RowStatistics stats = load_row(x, norm.dim, norm.eps, row);
    Vec sum = zero();
    for (int64_t j = 0; j < norm.dim; j += kLanes) {
      // Lanes beyond the row meet an out_weight of zero, and a weight and bias of zero keep them finite.
      const Vec value = gelu(normalise(row, j, norm.dim, stats, weight, bias));
      sum = fma(value, load_part(out_weight + j, norm.dim - j), sum);
    }
    args.delta[i] = sum_lanes(sum) + args.out_bias;
  }
}

}  // namespace transkimmer::cpu::TRANSKIMMER_ISA
