// Registration of the CPU operators that go row by row: row movement, LayerNorm, embeddings, and what stands
// around a matrix product.
//
// Composed in Python, each of these operators would be three or four calls. A call that takes 3 us in a tight
// loop takes about 25 us between two products, which leave no cache with anything but weights: with twelve
// layers of five products each, 2 % of a forward of 16 short sequences in bf16.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

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

// ids [batch, seq], or [1, seq] for every sequence, as the rows of `table` that they name.
std::vector<int32_t> rows_of(const Tensor& ids, const char* name, int64_t batch, int64_t seq,
                             const Tensor& table) {
  const bool wide = ids.scalar_type() == ScalarType::Long;
  check_tensor(ids, name, 2, wide ? ScalarType::Long : ScalarType::Int);
  STD_TORCH_CHECK((ids.size(0) == batch || ids.size(0) == 1) && ids.size(1) == seq, name, " has shape ",
                  shape_of(ids), "; expected [", batch, " or 1, ", seq, "]");
  const int64_t rows = std::min<int64_t>(table.size(0), int64_t{INT32_MAX} + 1);
  const int64_t next_sequence = ids.size(0) == 1 ? 0 : ids.stride(0), next_token = ids.stride(1);
  const void* data = ids.const_data_ptr();
  std::vector<int32_t> found;
  found.reserve(batch * seq);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t s = 0; s < seq; ++s) {
      const int64_t at = b * next_sequence + s * next_token;
      const int64_t id = wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
      STD_TORCH_CHECK(id >= 0 && id < rows, name, "[", b, ", ", s, "] is ", id, "; it must lie in [0, ", rows,
                      ")");
      found.push_back(static_cast<int32_t>(id));
    }
  }
  return found;
}

// Places 0, 1, ... seq - 1 of every sequence.
std::vector<int32_t> places(int64_t batch, int64_t seq, const Tensor& table) {
  STD_TORCH_CHECK(seq <= table.size(0), "input_ids has ", seq, " tokens a sequence; position_weight has ",
                  table.size(0), " rows");
  std::vector<int32_t> found(batch * seq);
  for (int64_t i = 0; i < batch * seq; ++i) found[i] = static_cast<int32_t>(i % seq);
  return found;
}

Tensor embed_tokens(const Tensor& input_ids, const OptionalTensor& position_ids,
                    const OptionalTensor& token_type_ids, const Tensor& word_weight,
                    const Tensor& position_weight, const OptionalTensor& type_weight,
                    const Tensor& norm_weight, const Tensor& norm_bias, double eps) {
  STD_TORCH_CHECK(input_ids.dim() == 2, "input_ids has shape ", shape_of(input_ids),
                  "; expected [batch, seq]");
  const int64_t batch = input_ids.size(0), seq = input_ids.size(1);
  const cpu::DType dtype = check_float(word_weight, "word_weight");
  const Tensor words = torch::stable::contiguous(word_weight);
  const Tensor positions = torch::stable::contiguous(position_weight);
  cpu::NormArgs args = cpu::norm_args(words, {norm_weight, norm_bias, eps});
  args.residual = check_matrix(positions, "position_weight", words);
  const std::vector<int32_t> word = rows_of(input_ids, "input_ids", batch, seq, words);
  const std::vector<int32_t> position = position_ids.has_value()
                                            ? rows_of(*position_ids, "position_ids", batch, seq, positions)
                                            : places(batch, seq, positions);
  args.x_index = word.data(), args.residual_index = position.data();
  OptionalTensor types;
  std::vector<int32_t> type(batch * seq);  // 0, unless ids say otherwise
  STD_TORCH_CHECK(type_weight.has_value() || !token_type_ids.has_value(),
                  "token_type_ids is given; type_weight is None");
  if (type_weight.has_value()) {
    types = torch::stable::contiguous(*type_weight);
    args.addend = check_matrix(*types, "type_weight", words);
    STD_TORCH_CHECK(types->size(0) > 0, "type_weight has no rows; expected one or more");
    if (token_type_ids.has_value()) type = rows_of(*token_type_ids, "token_type_ids", batch, seq, *types);
    args.addend_index = type.data();
  }
  Tensor out = torch::stable::new_empty(words, {batch, seq, args.dim});
  args.out = out.mutable_data_ptr();
  cpu::run_norm(cpu::kernels().norm_rows[static_cast<int>(dtype)], args, args.dim, batch * seq);
  return out;
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
  m.impl("embed_tokens.cpu", TORCH_BOX(&embed_tokens));
}

STABLE_TORCH_LIBRARY_IMPL(transkimmer_cpu, CompositeExplicitAutograd, m) {
  m.impl("takes_packed_weights", TORCH_BOX(&cpu::takes_packed_weights));
  m.impl("pack_panels", TORCH_BOX(&cpu::pack_panels));
}
