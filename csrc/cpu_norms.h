// Row movement and LayerNorm on tensors: checks, output tensors and threads around the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "cpu_checks.h"
#include "cpu_threads.h"
#include "transkimmer/cpu_kernels.h"

namespace transkimmer::cpu {

using checks::Sequences;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Rows x[index[i]] for i < count, in a matrix of `capacity` rows.
inline Tensor gather_listed(const Tensor& x, const int32_t* index, int64_t count, int64_t capacity) {
  const checks::RowShape shape = checks::check_rows(x, capacity);
  Tensor y = torch::stable::new_empty(x, shape.sizes);
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  parallel_rows(count, kGrainBytes, shape.bytes,
                [&](int64_t begin, int64_t end) { gather_rows(from, index, shape.bytes, begin, end, to); });
  return y;
}

// Zeros in the rows from `count` on: garbage there may be denormal, which a product is slow on.
inline void zero_tail(const Tensor& x, int64_t count) {
  const int64_t rows = x.size(0);
  if (count == rows) return;
  const int64_t row_bytes = x.numel() / rows * static_cast<int64_t>(x.element_size());
  auto* data = static_cast<char*>(x.mutable_data_ptr());
  std::fill(data + count * row_bytes, data + rows * row_bytes, char{0});
}

struct Norm {
  const Tensor &weight, &bias;
  double eps;
};

inline NormArgs norm_args(const Tensor& x, const Norm& norm) {
  NormArgs args{};
  args.x = checks::check_matrix(x, "x", x);
  args.dim = x.size(1);
  args.eps = static_cast<float>(norm.eps);
  args.weight = checks::check_vector(norm.weight, "norm_weight", x);
  args.bias = checks::check_vector(norm.bias, "norm_bias", x);
  return args;
}

template <typename Args>
void run_norm(void (*kernel)(const Args&, int64_t, int64_t, float*), const Args& args, int64_t dim,
              int64_t count) {
  parallel_rows(count, kGrainElements, dim, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, scratch(kernels().norm_scratch(dim)));
  });
}

// LayerNorm(x[index[i]]) for i < count, in a matrix of `capacity` rows.
inline Tensor layer_norm_listed(const Tensor& x, const int32_t* index, const Norm& norm, int64_t count,
                                int64_t capacity) {
  const DType dtype = checks::check_float(x, "x");
  NormArgs args = norm_args(x, norm);
  args.x_index = index;
  Tensor y = torch::stable::new_empty(x, {capacity, x.size(1)});
  args.out = y.mutable_data_ptr();
  run_norm(kernels().norm_rows[static_cast<int>(dtype)], args, args.dim, count);
  return y;
}

// out[out_index[i]] = LayerNorm(x[i] + residual[residual_index[i]]) for i < count; an index that is null
// stands for the identity. `out` may be `x`, or be `residual` row by row.
inline void add_layer_norm_(const Tensor& out, const int32_t* out_index, const Tensor& x,
                            const Tensor& residual, const int32_t* residual_index, const Norm& norm,
                            int64_t count) {
  const DType dtype = checks::check_float(x, "x");
  NormArgs args = norm_args(x, norm);
  args.residual = checks::check_matrix(residual, "residual", x);
  checks::check_matrix(out, "hidden", x);
  args.out = out.mutable_data_ptr();
  args.residual_index = residual_index;
  args.out_index = out_index;
  run_norm(kernels().norm_rows[static_cast<int>(dtype)], args, args.dim, count);
}

// delta[i] = GELU(LayerNorm(x[i])) . out_weight + out_bias for i < count; fp32 [rows of x].
inline Tensor layer_norm_gelu_dot(const Tensor& x, const Norm& norm, const Tensor& out_weight,
                                  const Tensor& out_bias, int64_t count) {
  const DType dtype = checks::check_float(x, "x");
  GeluDotArgs args{};
  args.norm = norm_args(x, norm);
  args.out_weight = checks::check_vector(out_weight, "out_weight", x);
  checks::check_dense(out_bias, "out_bias", 1, x.scalar_type());
  checks::check_length(out_bias, "out_bias", 1);
  if (dtype == DType::kFloat32) {
    args.out_bias = *static_cast<const float*>(out_bias.const_data_ptr());
  } else {
    args.out_bias = *static_cast<const torch::headeronly::BFloat16*>(out_bias.const_data_ptr());
  }
  Tensor delta = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
  args.delta = static_cast<float*>(delta.mutable_data_ptr());
  run_norm(kernels().norm_gelu_dot[static_cast<int>(dtype)], args, args.norm.dim, count);
  return delta;
}

}  // namespace transkimmer::cpu
