// Matrix products of the CPU operators, by the form of the weight: our own kernel for one in panels (packed
// by `pack_panels`), PyTorch's oneDNN for one packed by it, called through the C shim that PyTorch's
// ahead-of-time compiler uses, and PyTorch's own product for a plain matrix.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "cpu_checks.h"
#include "cpu_threads.h"
#include "transkimmer/cpu_kernels.h"

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

inline bool is_onednn(const Tensor& weight) {
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(weight.get(), &layout));
  return layout == aoti_torch_layout__mkldnn();
}

inline Tensor onednn_product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu) {
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
  // Its bytes are read as x's dtype. Python excludes autocast, which would give another.
  STD_TORCH_CHECK(y.scalar_type() == x.scalar_type(),
                  "weight: its product has another dtype than x; is autocast on?");
  if (!gelu) return y;
  std::array<StableIValue, 2> activation{from(y), from(std::string("none"))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::gelu", "", activation.data(), TORCH_ABI_VERSION));
  return to<Tensor>(activation[0]);
}

// ---- Weights in panels ----

// A weight [out, in] in panels is a tensor [out, in, form] of strides (1, product_columns, 0) over the
// panels, where `form` is product_columns, or one more with paired rows. So its sizes are those of the
// matrix, with a third dimension that tells layouts apart and that every operator which takes a matrix
// refuses. A copy of the storage (deepcopy) is as good as the original; a copy by element and a slice, whose
// strides or storage do not fit, are refused here.
inline bool is_panelled(const Tensor& weight) { return weight.dim() == 3; }

inline std::string describe_panels(int64_t columns, bool paired) {
  return std::to_string(columns) + (paired ? " columns with paired rows" : " columns");
}

inline void check_panels(const Tensor& weight, const char* name) {
  const int64_t columns = kernels().product_columns, given = weight.stride(1), pairs = weight.size(2) - given;
  STD_TORCH_CHECK(weight.stride(0) == 1 && weight.stride(2) == 0 && (pairs == 0 || pairs == 1), name,
                  " of shape ", checks::shape_of(weight),
                  " is neither a matrix nor a weight packed for these kernels");
  const bool paired =
      kernels().product_paired[static_cast<int>(checks::check_float(weight, name))](weight.size(1));
  STD_TORCH_CHECK(given == columns && pairs == paired, name, " is packed in panels of ",
                  describe_panels(given, pairs == 1), ", for another instruction set; ", kernels().isa,
                  " takes ", describe_panels(columns, paired));
  int64_t bytes, offset;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(weight.get(), &bytes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(weight.get(), &offset));
  const int64_t floats = kernels().product_panels(weight.size(0)) * weight.size(1) * columns;
  STD_TORCH_CHECK(offset == 0 && bytes == floats * static_cast<int64_t>(weight.element_size()), name,
                  " of shape ", checks::shape_of(weight), " is a part of a packed weight");
}

// Multiply-adds below which another thread does not pay (about 10 us). With few rows it is the weights that
// take the time.
constexpr int64_t kGrainProduct = 400'000;
constexpr int64_t kGrainRows = 8;

inline Tensor pack_panels(const Tensor& weight) {
  const int dtype = static_cast<int>(checks::check_float(weight, "weight"));
  checks::check_dense(weight, "weight", 2, weight.scalar_type());
  const int64_t out = weight.size(0), in = weight.size(1), columns = kernels().product_columns;
  STD_TORCH_CHECK(out > 0 && in > 0, "weight has shape ", checks::shape_of(weight), "; it must not be empty");
  const int64_t panels = kernels().product_panels(out);
  Tensor packed = torch::stable::new_empty(weight, {panels * in * columns});
  void* to = packed.mutable_data_ptr();
  parallel_rows(panels, kGrainBytes, in * columns * static_cast<int64_t>(weight.element_size()),
                [&](int64_t begin, int64_t end) {
                  kernels().pack_panels[dtype](weight.const_data_ptr(), out, in, begin, end, to);
                });
  const std::array<int64_t, 3> sizes{out, in, columns + kernels().product_paired[dtype](in)};
  const std::array<int64_t, 3> strides{1, columns, 0};
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(packed.get(), 3, sizes.data(), strides.data(), 0, &view));
  return Tensor(view);
}

// The first `count` rows; the others stay unwritten.
inline Tensor panel_product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu,
                            int64_t count) {
  const int dtype = static_cast<int>(checks::check_float(x, "x"));
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  if (count == 0) return y;
  const ProductArgs args{count,
                         weight.size(1),
                         weight.size(0),
                         x.const_data_ptr(),
                         weight.const_data_ptr(),
                         bias.has_value() ? bias->const_data_ptr() : nullptr,
                         gelu,
                         y.mutable_data_ptr()};
  const Kernels& k = kernels();
  const int64_t floats = k.product_scratch[dtype](args);
  parallel_rows(k.product_panels(args.out), kGrainProduct,
                std::max(count, kGrainRows) * args.in * k.product_columns,
                [&](int64_t begin, int64_t end) { k.product[dtype](args, begin, end, scratch(floats)); });
  return y;
}

// ---- Any weight ----

// weight [out, in] for rows of `in`, and its bias [out]; `name` is "weight", or something that ends so.
inline void check_weight(const Tensor& weight, const OptionalTensor& bias, const Tensor& x,
                         const std::string& name = "weight") {
  checks::check_tensor(weight, name.c_str(), is_panelled(weight) ? 3 : 2, x.scalar_type());
  if (is_panelled(weight)) check_panels(weight, name.c_str());
  STD_TORCH_CHECK(weight.size(1) == x.size(1), name, " has shape ", checks::shape_of(weight),
                  "; x has rows of ", x.size(1));
  if (!bias.has_value()) return;
  const std::string bias_name = name.substr(0, name.size() - 6) + "bias";
  checks::check_dense(*bias, bias_name.c_str(), 1, x.scalar_type());
  checks::check_length(*bias, bias_name.c_str(), weight.size(0));
}

// activation(x weight^T + bias) on the first `count` rows of x, which is dense; what stands in the rows
// behind them is undefined. Checked by `check_weight`.
inline Tensor product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu,
                      int64_t count) {
  if (is_panelled(weight)) return panel_product(x, weight, bias, gelu, count);
  return (is_onednn(weight) ? onednn_product : plain_product)(x, weight, bias, gelu);
}

// The same on valid rows of a list; oneDNN computes up to kRowMultiple - 1 more.
inline Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu,
                     const Sequences& s) {
  check_weight(weight, bias, x);
  const int64_t capacity = x.size(0);
  if (is_panelled(weight)) return panel_product(x, weight, bias, gelu, s.count);
  const int64_t rows = std::min(capacity, round_up_rows(s.count));
  if (rows == capacity && rows > 0) return product(x, weight, bias, gelu, rows);
  Tensor y = torch::stable::new_empty(x, {capacity, weight.size(0)});
  if (rows > 0) {
    Tensor all = x;
    Tensor valid = torch::stable::narrow(y, 0, 0, rows);
    torch::stable::copy_(valid, product(torch::stable::narrow(all, 0, 0, rows), weight, bias, gelu, rows));
  }
  return y;
}

}  // namespace transkimmer::cpu
