// Registration of the CPU operators that go row by row: row movement, LayerNorm, and what stands around a
// matrix product.
//
// Composed in Python, each of these operators would be three or four calls. A call that takes 3 us in a tight
// loop takes about 25 us between two products, which leave no cache with anything but weights: with twelve
// layers of five products each, 2 % of a forward of 16 short sequences in bf16.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>

#include "cpu_checks.h"
#include "cpu_norms.h"
#include "cpu_products.h"
#include "cpu_threads.h"
#include "transkimmer/cpu_kernels.h"

namespace {

namespace cpu = transkimmer::cpu;
using namespace cpu::checks;
using cpu::OptionalTensor;

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

Tensor skim_logit(const Tensor& hidden, const Tensor& slots, const Tensor& cu_seqlens,
                  const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& fc_weight,
                  const Tensor& fc_bias, const Tensor& norm2_weight, const Tensor& norm2_bias,
                  const Tensor& out_weight, const Tensor& out_bias, double eps) {
  check_dense(hidden, "hidden", 2, hidden.scalar_type());
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", slots.numel());
  const int32_t* index = check_slots(slots, "slots", s.count, hidden.size(0));
  const Tensor x =
      cpu::layer_norm_listed(hidden, index, {norm1_weight, norm1_bias, eps}, s.count, slots.numel());
  const Tensor y = cpu::linear(x, fc_weight, fc_bias, /*gelu=*/false, s);  // [capacity, m]
  return cpu::layer_norm_gelu_dot(y, {norm2_weight, norm2_bias, eps}, out_weight, out_bias, s.count);
}

Tensor ragged_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const Tensor& cu_seqlens, const OptionalTensor& slots, const std::string& activation) {
  check_float(x, "x");
  check_dense(x, "x", 2, x.scalar_type());
  const bool gelu = check_activation(activation);
  const int64_t capacity = slots.has_value() ? slots->numel() : x.size(0);
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", capacity);
  if (!slots.has_value()) return cpu::linear(x, weight, bias, gelu, s);
  const int32_t* index = check_slots(slots, "slots", s.count, x.size(0));
  return cpu::linear(cpu::gather_listed(x, index, s.count, capacity), weight, bias, gelu, s);
}

Tensor ragged_linear_norm(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          const Tensor& residual, const OptionalTensor& residual_slots,
                          const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                          const Tensor& cu_seqlens) {
  check_dense(x, "x", 2, x.scalar_type());
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", x.size(0));
  check_dense(residual, "residual", 2, x.scalar_type());
  const int32_t* index = check_slots(residual_slots, "residual_slots", s.count, residual.size(0));
  Tensor y = cpu::linear(x, weight, bias, /*gelu=*/false, s);
  cpu::add_layer_norm_(y, nullptr, y, residual, index, {norm_weight, norm_bias, eps}, s.count);
  return y;
}

void ragged_linear_norm_(const Tensor& hidden, const Tensor& slots, const Tensor& x, const Tensor& weight,
                         const OptionalTensor& bias, const Tensor& residual, const Tensor& norm_weight,
                         const Tensor& norm_bias, double eps, const Tensor& cu_seqlens) {
  check_dense(x, "x", 2, x.scalar_type());
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", x.size(0));
  check_dense(hidden, "hidden", 2, x.scalar_type());
  check_dense(residual, "residual", 2, x.scalar_type());
  check_slots(std::nullopt, "residual_slots", s.count, residual.size(0));
  const int32_t* index = check_slots(slots, "slots", s.count, hidden.size(0));
  const Tensor y = cpu::linear(x, weight, bias, /*gelu=*/false, s);
  cpu::add_layer_norm_(hidden, index, y, residual, nullptr, {norm_weight, norm_bias, eps}, s.count);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transkimmer, CPU, m) { m.impl("scatter_rows.cpu", TORCH_BOX(&scatter_rows)); }

// For every device: packed weights carry a dispatch key of their own. Which device a backend serves is the
// business of the Python registry, and the checks refuse tensors that are not on the CPU.
STABLE_TORCH_LIBRARY_IMPL(transkimmer, CompositeExplicitAutograd, m) {
  m.impl("skim_logit.cpu", TORCH_BOX(&skim_logit));
  m.impl("ragged_linear.cpu", TORCH_BOX(&ragged_linear));
  m.impl("ragged_linear_norm.cpu", TORCH_BOX(&ragged_linear_norm));
  m.impl("ragged_linear_norm_.cpu", TORCH_BOX(&ragged_linear_norm_));
}

STABLE_TORCH_LIBRARY_IMPL(transkimmer_cpu, CompositeExplicitAutograd, m) {
  m.impl("takes_packed_weights", TORCH_BOX(&cpu::takes_packed_weights));
  m.impl("pack_panels", TORCH_BOX(&cpu::pack_panels));
}
