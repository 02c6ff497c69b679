// Checks of what the CPU operators are called with. They guard memory: whatever passes them cannot make a
// kernel read or write outside its tensors. Each message names the argument, its value and what is allowed.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "transkimmer/cpu_kernels.h"

namespace transkimmer::cpu::checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(t.size(i));
  return text + "]";
}

inline void check_tensor(const Tensor& t, const char* name, int64_t dim, ScalarType dtype) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has dtype ", torch::headeronly::toString(t.scalar_type()),
                  "; expected ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(t.dim() == dim, name, " has shape ", shape_of(t), "; expected ", dim, " dimension(s)");
}

inline void check_dense(const Tensor& t, const char* name, int64_t dim, ScalarType dtype) {
  check_tensor(t, name, dim, dtype);
  STD_TORCH_CHECK(t.is_contiguous(), name, " of shape ", shape_of(t), " must be contiguous");
}

inline void check_length(const Tensor& t, const char* name, int64_t length) {
  STD_TORCH_CHECK(t.size(0) == length, name, " has ", t.size(0), " rows; expected ", length);
}

inline DType check_float(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name, " has dtype ",
                  torch::headeronly::toString(dtype), "; the CPU kernels take float32 and bfloat16");
  return dtype == ScalarType::Float ? DType::kFloat32 : DType::kBFloat16;
}

// Whether it is the GELU.
inline bool check_activation(const std::string& activation) {
  STD_TORCH_CHECK(activation == "none" || activation == "gelu", "activation is '", activation,
                  "'; it must be 'none' or 'gelu'");
  return activation == "gelu";
}

struct Sequences {
  const int32_t* offsets;
  int64_t batch, count;  // count = offsets[batch], the number of valid rows
};

inline Sequences check_sequences(const Tensor& cu_seqlens, const char* name, int64_t capacity) {
  check_dense(cu_seqlens, name, 1, ScalarType::Int);
  STD_TORCH_CHECK(cu_seqlens.size(0) >= 1, name, " is empty; expected [batch + 1] entries");
  const Sequences s{static_cast<const int32_t*>(cu_seqlens.const_data_ptr()), cu_seqlens.size(0) - 1, 0};
  STD_TORCH_CHECK(s.offsets[0] == 0, name, "[0] is ", s.offsets[0], "; it must be 0");
  for (int64_t b = 0; b < s.batch; ++b) {
    STD_TORCH_CHECK(s.offsets[b] <= s.offsets[b + 1], name, " decreases from ", s.offsets[b], " to ",
                    s.offsets[b + 1], " at entry ", b + 1, "; it must be non-decreasing");
  }
  STD_TORCH_CHECK(s.offsets[s.batch] <= capacity, name, "[-1] is ", s.offsets[s.batch],
                  ", more than the capacity of ", capacity, " rows");
  return {s.offsets, s.batch, s.offsets[s.batch]};
}

// The first `count` entries of a slot list, each within [0, rows); null for no list.
inline const int32_t* check_slots(const std::optional<Tensor>& slots, const char* name, int64_t count,
                                  int64_t rows) {
  if (!slots.has_value()) {
    STD_TORCH_CHECK(count <= rows, name, " is None, so ", rows,
                    " rows must be at least cu_seqlens[-1] = ", count);
    return nullptr;
  }
  check_dense(*slots, name, 1, ScalarType::Int);
  STD_TORCH_CHECK(slots->size(0) >= count, name, " has ", slots->size(0), " entries; cu_seqlens[-1] is ",
                  count);
  const auto* p = static_cast<const int32_t*>(slots->const_data_ptr());
  bool outside = false;  // no branch in the loop, so that it vectorises
  for (int64_t i = 0; i < count; ++i) outside |= p[i] < 0 || p[i] >= rows;
  for (int64_t i = 0; outside && i < count; ++i) {
    STD_TORCH_CHECK(p[i] >= 0 && p[i] < rows, name, "[", i, "] is ", p[i], "; it must lie in [0, ", rows,
                    ")");
  }
  return p;
}

// Shape of x with another number of rows, and the bytes of one row.
struct RowShape {
  std::vector<int64_t> sizes;
  int64_t bytes;
};

inline RowShape check_rows(const Tensor& x, int64_t rows) {
  STD_TORCH_CHECK(x.is_cpu(), "x must be a CPU tensor");
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_contiguous(), "x of shape ", shape_of(x),
                  " must be contiguous and have at least one dimension");
  RowShape shape{{rows}, static_cast<int64_t>(x.element_size())};
  for (int64_t i = 1; i < x.dim(); ++i) {
    shape.sizes.push_back(x.size(i));
    shape.bytes *= x.size(i);
  }
  return shape;
}

inline HeadView check_heads(const Tensor& t, const char* name, ScalarType dtype, int64_t capacity,
                            int64_t heads, int64_t head_dim) {
  check_tensor(t, name, 3, dtype);
  STD_TORCH_CHECK(t.size(0) == capacity && t.size(1) == heads && t.size(2) == head_dim, name, " has shape ",
                  shape_of(t), "; expected [", capacity, ", ", heads, ", ", head_dim, "]");
  STD_TORCH_CHECK(t.numel() == 0 || t.stride(2) == 1, name, " has stride ", t.stride(2),
                  " in its last dimension, which must be contiguous");
  return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

inline const void* check_vector(const Tensor& t, const char* name, const Tensor& x) {
  check_dense(t, name, 1, x.scalar_type());
  STD_TORCH_CHECK(t.size(0) == x.size(1), name, " has ", t.size(0), " entries; x has rows of ", x.size(1));
  return t.const_data_ptr();
}

inline const void* check_matrix(const Tensor& t, const char* name, const Tensor& x) {
  check_dense(t, name, 2, x.scalar_type());
  STD_TORCH_CHECK(t.size(1) == x.size(1), name, " has rows of ", t.size(1), "; x has rows of ", x.size(1));
  return t.const_data_ptr();
}

}  // namespace transkimmer::cpu::checks
