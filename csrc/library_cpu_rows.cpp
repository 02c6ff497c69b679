// Registration of the CPU operators that go row by row: row movement, LayerNorm, and what stands around a
// matrix product. The products themselves are PyTorch's oneDNN, called through the C shim that its
// ahead-of-time compiler uses.
//
// Composed in Python, each of these operators would be three or four calls. A call that takes 3 us in a tight
// loop takes about 25 us between two products, which leave no cache with anything but weights: with twelve
// layers of five products each, 2 % of a forward of 16 short sequences in bf16.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
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

namespace {

namespace cpu = transkimmer::cpu;
using namespace cpu::checks;
using OptionalTensor = std::optional<Tensor>;

// ---- Row movement ----

Tensor gather_listed(const Tensor& x, const Tensor& slots, const Sequences& s) {
  const RowShape shape = check_rows(x, slots.numel());
  const int32_t* index = check_slots(slots, "slots", s.count, x.size(0));
  Tensor y = torch::stable::new_empty(x, shape.sizes);
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  cpu::parallel_rows(s.count, cpu::kGrainBytes, shape.bytes, [&](int64_t begin, int64_t end) {
    cpu::gather_rows(from, index, shape.bytes, begin, end, to);
  });
  return y;
}

Tensor gather_rows(const Tensor& x, const Tensor& slots, const Tensor& cu_seqlens) {
  return gather_listed(x, slots, check_sequences(cu_seqlens, "cu_seqlens", slots.numel()));
}

Tensor scatter_rows(const Tensor& x, const Tensor& slots, const Tensor& cu_seqlens, int64_t num_rows) {
  STD_TORCH_CHECK(num_rows >= 0 && num_rows <= INT32_MAX, "num_rows is ", num_rows,
                  "; it must lie in [0, 2^31)");
  const RowShape shape = check_rows(x, num_rows);
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", x.size(0));
  const int32_t* index = check_slots(slots, "slots", s.count, num_rows);
  // Through the inverse of the index every output row is written exactly once, zeros included.
  auto* inverse = reinterpret_cast<int32_t*>(cpu::scratch(num_rows));
  std::fill(inverse, inverse + num_rows, -1);
  for (int64_t i = 0; i < s.count; ++i) inverse[index[i]] = static_cast<int32_t>(i);
  Tensor y = torch::stable::new_empty(x, shape.sizes);
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  cpu::parallel_rows(num_rows, cpu::kGrainBytes, shape.bytes, [&](int64_t begin, int64_t end) {
    cpu::scatter_rows(from, inverse, shape.bytes, begin, end, to);
  });
  return y;
}

// ---- Matrix products ----

// oneDNN compiles a kernel per row count: they are rounded up to this, so that they recur. The runtime
// shortens its lists to the same multiple (transkimmer_kernels/onednn.py).
constexpr int64_t kRowMultiple = 8;

bool takes_packed_weights() { return aoti_torch_cpu__linear_pointwise != nullptr; }

bool is_packed(const Tensor& weight) {
  int32_t layout;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(weight.get(), &layout));
  return layout == aoti_torch_layout__mkldnn();
}

Tensor packed_product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu) {
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

Tensor plain_product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu) {
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

void check_weight(const Tensor& weight, const OptionalTensor& bias, const Tensor& x) {
  check_tensor(weight, "weight", 2, x.scalar_type());
  STD_TORCH_CHECK(weight.size(1) == x.size(1), "weight has shape ", shape_of(weight), "; x has rows of ",
                  x.size(1));
  if (!bias.has_value()) return;
  check_dense(*bias, "bias", 1, x.scalar_type());
  check_length(*bias, "bias", weight.size(0));
}

// x weight^T + bias on the valid rows and at most kRowMultiple - 1 more; the rows behind them stay unwritten.
Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool gelu,
              const Sequences& s) {
  check_weight(weight, bias, x);
  const int64_t capacity = x.size(0);
  const int64_t rows = std::min(capacity, (s.count + kRowMultiple - 1) / kRowMultiple * kRowMultiple);
  const auto product = is_packed(weight) ? packed_product : plain_product;
  if (rows == capacity && rows > 0) return product(x, weight, bias, gelu);
  Tensor y = torch::stable::new_empty(x, {capacity, weight.size(0)});
  if (rows > 0) {
    Tensor all = x;
    Tensor valid = torch::stable::narrow(y, 0, 0, rows);
    torch::stable::copy_(valid, product(torch::stable::narrow(all, 0, 0, rows), weight, bias, gelu));
  }
  return y;
}

// ---- LayerNorm and what surrounds it ----

struct Norm {
  const Tensor &weight, &bias;
  double eps;
};

cpu::NormArgs norm_args(const Tensor& x, const Norm& norm) {
  cpu::NormArgs args{};
  args.x = check_matrix(x, "x", x);
  args.dim = x.size(1);
  args.eps = static_cast<float>(norm.eps);
  args.weight = check_vector(norm.weight, "norm_weight", x);
  args.bias = check_vector(norm.bias, "norm_bias", x);
  return args;
}

template <typename Args>
void run_norm(void (*kernel)(const Args&, int64_t, int64_t, float*), const Args& args, int64_t dim,
              int64_t count) {
  cpu::parallel_rows(count, cpu::kGrainElements, dim, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, cpu::scratch(cpu::kernels().norm_scratch(dim)));
  });
}

Tensor layer_norm_listed(const Tensor& x, const Tensor& slots, const Norm& norm, const Sequences& s) {
  const cpu::DType dtype = check_float(x, "x");
  cpu::NormArgs args = norm_args(x, norm);
  args.x_index = check_slots(slots, "slots", s.count, x.size(0));
  Tensor y = torch::stable::new_empty(x, {slots.numel(), x.size(1)});
  args.out = y.mutable_data_ptr();
  run_norm(cpu::kernels().norm_rows[static_cast<int>(dtype)], args, args.dim, s.count);
  return y;
}

// out[out_slots[i]] = LayerNorm(x[i] + residual[residual_slots[i]]); `out` may be `x`, or be `residual` row
// by row.
void add_layer_norm_(const Tensor& out, const OptionalTensor& out_slots, const Tensor& x,
                     const Tensor& residual, const OptionalTensor& residual_slots, const Norm& norm,
                     const Sequences& s) {
  const cpu::DType dtype = check_float(x, "x");
  cpu::NormArgs args = norm_args(x, norm);
  args.residual = check_matrix(residual, "residual", x);
  check_matrix(out, "hidden", x);
  args.out = out.mutable_data_ptr();
  args.residual_index = check_slots(residual_slots, "residual_slots", s.count, residual.size(0));
  args.out_index = check_slots(out_slots, "slots", s.count, out.size(0));
  run_norm(cpu::kernels().norm_rows[static_cast<int>(dtype)], args, args.dim, s.count);
}

Tensor layer_norm_gelu_dot(const Tensor& x, const Norm& norm, const Tensor& out_weight,
                           const Tensor& out_bias, const Sequences& s) {
  const cpu::DType dtype = check_float(x, "x");
  cpu::GeluDotArgs args{};
  args.norm = norm_args(x, norm);
  args.out_weight = check_vector(out_weight, "out_weight", x);
  check_dense(out_bias, "out_bias", 1, x.scalar_type());
  check_length(out_bias, "out_bias", 1);
  if (dtype == cpu::DType::kFloat32) {
    args.out_bias = *static_cast<const float*>(out_bias.const_data_ptr());
  } else {
    args.out_bias = *static_cast<const torch::headeronly::BFloat16*>(out_bias.const_data_ptr());
  }
  Tensor delta = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
  args.delta = static_cast<float*>(delta.mutable_data_ptr());
  run_norm(cpu::kernels().norm_gelu_dot[static_cast<int>(dtype)], args, args.norm.dim, s.count);
  return delta;
}

// ---- The operators ----

Tensor skim_logit(const Tensor& hidden, const Tensor& slots, const Tensor& cu_seqlens,
                  const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& fc_weight,
                  const Tensor& fc_bias, const Tensor& norm2_weight, const Tensor& norm2_bias,
                  const Tensor& out_weight, const Tensor& out_bias, double eps) {
  check_dense(hidden, "hidden", 2, hidden.scalar_type());
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", slots.numel());
  const Tensor x = layer_norm_listed(hidden, slots, {norm1_weight, norm1_bias, eps}, s);  // [capacity, d]
  const Tensor y = linear(x, fc_weight, fc_bias, /*gelu=*/false, s);                      // [capacity, m]
  return layer_norm_gelu_dot(y, {norm2_weight, norm2_bias, eps}, out_weight, out_bias, s);
}

Tensor ragged_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const Tensor& cu_seqlens, const OptionalTensor& slots, const std::string& activation) {
  check_float(x, "x");
  check_dense(x, "x", 2, x.scalar_type());
  STD_TORCH_CHECK(activation == "none" || activation == "gelu", "activation is '", activation,
                  "'; it must be 'none' or 'gelu'");
  const int64_t capacity = slots.has_value() ? slots->numel() : x.size(0);
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", capacity);
  return linear(slots.has_value() ? gather_listed(x, *slots, s) : x, weight, bias, activation == "gelu", s);
}

Tensor ragged_linear_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          const Tensor& residual, const OptionalTensor& residual_slots,
                          const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                          const Tensor& cu_seqlens) {
  check_dense(x, "x", 2, x.scalar_type());
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", x.size(0));
  Tensor y = linear(x, weight, bias, /*gelu=*/false, s);
  add_layer_norm_(y, std::nullopt, y, residual, residual_slots, {norm_weight, norm_bias, eps}, s);
  return y;
}

void ragged_linear_norm_(const Tensor& hidden, const Tensor& slots, const Tensor& x, const Tensor& weight,
                         const OptionalTensor& bias, const Tensor& residual, const Tensor& norm_weight,
                         const Tensor& norm_bias, double eps, const Tensor& cu_seqlens) {
  check_dense(x, "x", 2, x.scalar_type());
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", x.size(0));
  const Tensor y = linear(x, weight, bias, /*gelu=*/false, s);
  add_layer_norm_(hidden, slots, y, residual, std::nullopt, {norm_weight, norm_bias, eps}, s);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transkimmer, CPU, m) {
  m.impl("gather_rows.cpu", TORCH_BOX(&gather_rows));
  m.impl("scatter_rows.cpu", TORCH_BOX(&scatter_rows));
}

// For every device: packed weights carry a dispatch key of their own. Which device a backend serves is the
// business of the Python registry, and the checks refuse tensors that are not on the CPU.
STABLE_TORCH_LIBRARY_IMPL(transkimmer, CompositeExplicitAutograd, m) {
  m.impl("skim_logit.cpu", TORCH_BOX(&skim_logit));
  m.impl("ragged_linear.cpu", TORCH_BOX(&ragged_linear));
  m.impl("ragged_linear_norm.cpu", TORCH_BOX(&ragged_linear_norm));
  m.impl("ragged_linear_norm_.cpu", TORCH_BOX(&ragged_linear_norm_));
}

STABLE_TORCH_LIBRARY_IMPL(transkimmer_cpu, CompositeExplicitAutograd, m) {
  m.impl("takes_packed_weights", TORCH_BOX(&takes_packed_weights));
}
