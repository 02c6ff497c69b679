// Matrix products of the CPU operators: PyTorch's oneDNN, called through the C shim that its ahead-of-time
// compiler uses, with weights that may be packed.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "cpu_checks.h"

// Not declared as strictly stable by PyTorch: where a version lacks it, weights are multiplied as they are.
extern "C" [[gnu::weak]] AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attr,
    const double** scalars, int64_t scalars_len, const char** algorithm, AtenTensorHandle* result);

namespace transkimmer::cpu {

using checks::Sequences;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// oneDNN compiles a kernel per row count: they are rounded up to this, so that they recur. The runtime
// shortens its lists to the same multiple (transkimmer_kernels/onednn.py).
constexpr int64_t kRowMultiple = 8;

inline int64_t round_up_rows(int64_t count) {
  return (count + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
}

inline bool takes_packed_weights() { return aoti_torch_cpu__linear_pointwise != nullptr; }

inline bool is_packed(const Tensor& weight) {
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(weight.get(), &layout));
  return layout == aoti_torch_layout__mkldnn();
}

inline Tensor packed_product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu) {
  STD_TORCH_CHECK(takes_packed_weights(),
                  "weight is packed for oneDNN, but this PyTorch has no product for it; pass it as it was");
  AtenTensorHandle bias_handle = bias.has_value() ? bias->get() : nullptr;
  const char* exact = "none";
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu__linear_pointwise(x.get(), weight.get(), bias.has_value() ? &bias_handle : nullptr,
                                       gelu ? "gelu" : "none", nullptr, 0, &exact, &result));
  return Tensor(result);
}

inline Tensor plain_product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 3> linear{from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", linear.data(), TORCH_ABI_VERSION));
  Tensor y = to<Tensor>(linear[0]);
  if (!gelu) return y;
  std::array<StableIValue, 2> activation{from(y), from(std::string("none"))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::gelu", "", activation.data(), TORCH_ABI_VERSION));
  return to<Tensor>(activation[0]);
}

// weight [out, in] for rows of `in`, and its bias [out]; `name` is "weight", or something that ends so.
inline void check_weight(const Tensor& weight, const OptionalTensor& bias, const Tensor& x,
                         const std::string& name = "weight") {
  checks::check_tensor(weight, name.c_str(), 2, x.scalar_type());
  STD_TORCH_CHECK(weight.size(1) == x.size(1), name, " has shape ", checks::shape_of(weight),
                  "; x has rows of ", x.size(1));
  if (!bias.has_value()) return;
  const std::string bias_name = name.substr(0, name.size() - 6) + "bias";
  checks::check_dense(*bias, bias_name.c_str(), 1, x.scalar_type());
  checks::check_length(*bias, bias_name.c_str(), weight.size(0));
}

// activation(x weight^T + bias), every row of x; checked by `check_weight`.
inline Tensor product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu) {
  return (is_packed(weight) ? packed_product : plain_product)(x, weight, bias, gelu);
}

// The same on the valid rows and at most kRowMultiple - 1 more; the rows behind them stay unwritten.
inline Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu,
                     const Sequences& s) {
  check_weight(weight, bias, x);
  const int64_t capacity = x.size(0);
  const int64_t rows = std::min(capacity, round_up_rows(s.count));
  if (rows == capacity && rows > 0) return product(x, weight, bias, gelu);
  Tensor y = torch::stable::new_empty(x, {capacity, weight.size(0)});
  if (rows > 0) {
    Tensor all = x;
    Tensor valid = torch::stable::narrow(y, 0, 0, rows);
    torch::stable::copy_(valid, product(torch::stable::narrow(all, 0, 0, rows), weight, bias, gelu));
  }
  return y;
}

}  // namespace transkimmer::cpu
