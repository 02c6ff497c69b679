// Registration of the CPU operators that are made of several others: a skimming decision and an encoder layer
// at inference.
//
// What they save is what happens between the steps. A call from Python takes 10 to 30 us once a matrix
// product has filled the caches with weights, and every step alone reads the offsets and makes its outputs
// anew. Here a layer is one call, its buffers hold the surviving rows and nothing else, and gathered rows
// serve projections and residual alike.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_attention.h"
#include "cpu_checks.h"
#include "cpu_norms.h"
#include "cpu_products.h"
#include "transkimmer/cpu_kernels.h"

namespace {

namespace cpu = transkimmer::cpu;
using namespace cpu::checks;
using cpu::OptionalTensor;

// ---- Skimming ----

// The tokens that a predictor has to look at, by list position and slot: not the first ones, if they stay
// anyway.
struct Candidates {
  std::vector<int32_t> positions, slots;

  Candidates(const int32_t* all, const Sequences& s, bool keep_first) {
    positions.reserve(s.count);
    slots.reserve(s.count);
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int32_t i = s.offsets[b] + (keep_first ? 1 : 0); i < s.offsets[b + 1]; ++i) {
        positions.push_back(i);
        slots.push_back(all[i]);
      }
    }
  }
};

std::tuple<Tensor, Tensor> skim_tokens(const Tensor& hidden, const Tensor& slots, const Tensor& cu_seqlens,
                                       const Tensor& norm1_weight, const Tensor& norm1_bias,
                                       const Tensor& fc_weight, const Tensor& fc_bias,
                                       const Tensor& norm2_weight, const Tensor& norm2_bias,
                                       const Tensor& out_weight, const Tensor& out_bias, double eps,
                                       double logit_threshold, bool keep_first) {
  check_dense(hidden, "hidden", 2, hidden.scalar_type());
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", slots.numel());
  const int32_t* index = check_slots(slots, "slots", s.count, hidden.size(0));
  cpu::check_weight(fc_weight, fc_bias, hidden, "fc_weight");
  Tensor new_slots = torch::stable::new_empty(slots, slots.sizes());
  Tensor new_cu_seqlens = torch::stable::new_empty(cu_seqlens, cu_seqlens.sizes());
  const Candidates candidates(index, s, keep_first);
  std::vector<uint8_t> keep(s.count);
  if (const auto count = static_cast<int64_t>(candidates.slots.size()); count > 0) {
    const Tensor x = cpu::layer_norm_listed(hidden, candidates.slots.data(), {norm1_weight, norm1_bias, eps},
                                            count, cpu::round_up_rows(count));
    cpu::zero_tail(x, count);
    const Tensor y = cpu::product(x, fc_weight, fc_bias, /*gelu=*/false, count);  // [rows, m]
    const Tensor delta =
        cpu::layer_norm_gelu_dot(y, {norm2_weight, norm2_bias, eps}, out_weight, out_bias, count);
    const auto* logit = static_cast<const float*>(delta.const_data_ptr());
    const auto threshold = static_cast<float>(logit_threshold);
    // Not `>=`: a NaN stays.
    for (int64_t i = 0; i < count; ++i) keep[candidates.positions[i]] = !(logit[i] < threshold);
  }
  cpu::compact(keep.data(), index, s.offsets, s.batch, keep_first,
               static_cast<int32_t*>(new_slots.mutable_data_ptr()),
               static_cast<int32_t*>(new_cu_seqlens.mutable_data_ptr()));
  return {new_slots, new_cu_seqlens};
}

// ---- An encoder layer ----

// Rows a layer works on, gathered, and where they come from.
struct Rows {
  Tensor x;                // [rows, d], zeros from `count` on
  const int32_t* slots;    // [count]
  const int32_t* offsets;  // [batch + 1]
  int64_t count;
};

Rows gathered(const Tensor& hidden, const int32_t* slots, const int32_t* offsets, int64_t count) {
  Rows rows{cpu::gather_listed(hidden, slots, count, cpu::round_up_rows(count)), slots, offsets, count};
  cpu::zero_tail(rows.x, count);
  return rows;
}

// The first token of every sequence that has one.
struct FirstTokens {
  std::vector<int32_t> slots, offsets;

  FirstTokens(const int32_t* all, const Sequences& s) : offsets(s.batch + 1) {
    for (int64_t b = 0; b < s.batch; ++b) {
      if (s.offsets[b] < s.offsets[b + 1]) slots.push_back(all[s.offsets[b]]);
      offsets[b + 1] = static_cast<int32_t>(slots.size());
    }
  }
};

// The columns of a projection [rows, ...] from `column` on, as heads.
cpu::HeadView heads_from(const Tensor& projection, int64_t column, int64_t head_dim) {
  const auto* data = static_cast<const char*>(projection.const_data_ptr());
  return {data + column * static_cast<int64_t>(projection.element_size()), projection.size(1), head_dim};
}

// softmax(q k^T / sqrt(head_dim)) v, [rows of queries, d].
Tensor attention(const Rows& queries, const Rows& keys, const cpu::HeadView& q, const cpu::HeadView& k,
                 const cpu::HeadView& v, int64_t batch, int64_t num_heads) {
  const int64_t width = queries.x.size(1), head_dim = width / num_heads;
  Tensor context = torch::stable::new_empty(queries.x, {queries.x.size(0), width});
  cpu::AttentionForwardArgs args{};
  args.shape = {
      batch,          num_heads,       head_dim,     queries.x.size(0),
      keys.x.size(0), queries.offsets, keys.offsets, 1.0f / std::sqrt(static_cast<float>(head_dim))};
  args.q = q, args.k = k, args.v = v;
  args.out = context.mutable_data_ptr();
  cpu::attend(args, check_float(context, "hidden"));
  cpu::zero_tail(context, queries.count);
  return context;
}

void check_projection(const Tensor& weight, const OptionalTensor& bias, const Tensor& x, int64_t rows,
                      const char* name) {
  cpu::check_weight(weight, bias, x, name);
  STD_TORCH_CHECK(weight.size(0) == rows, name, " has shape ", shape_of(weight), "; expected ", rows,
                  " rows");
}

void encoder_layer_(const Tensor& hidden, const Tensor& slots, const Tensor& cu_seqlens,
                    int64_t /*max_seqlen*/, int64_t num_heads, const Tensor& qkv_weight,
                    const OptionalTensor& qkv_bias, const OptionalTensor& query_weight,
                    const OptionalTensor& query_bias, const Tensor& out_weight,
                    const OptionalTensor& out_bias, const Tensor& norm1_weight, const Tensor& norm1_bias,
                    double norm1_eps, const Tensor& ffn_in_weight, const OptionalTensor& ffn_in_bias,
                    const Tensor& ffn_out_weight, const OptionalTensor& ffn_out_bias,
                    const Tensor& norm2_weight, const Tensor& norm2_bias, double norm2_eps,
                    const std::string& activation) {
  check_float(hidden, "hidden");
  check_dense(hidden, "hidden", 2, hidden.scalar_type());
  const int64_t width = hidden.size(1), head_dim = num_heads > 0 ? width / num_heads : 0;
  STD_TORCH_CHECK(head_dim > 0 && head_dim * num_heads == width, "num_heads is ", num_heads,
                  "; it must divide the width of hidden, ", width);
  const bool gelu = check_activation(activation), first_only = query_weight.has_value();
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", slots.numel());
  const int32_t* index = check_slots(slots, "slots", s.count, hidden.size(0));
  check_projection(qkv_weight, qkv_bias, hidden, (first_only ? 2 : 3) * width, "qkv_weight");
  if (first_only) check_projection(*query_weight, query_bias, hidden, width, "query_weight");
  check_projection(out_weight, out_bias, hidden, width, "out_weight");
  check_projection(ffn_in_weight, ffn_in_bias, hidden, ffn_out_weight.size(1), "ffn_in_weight");
  if (s.count == 0) return;

  const Rows keys = gathered(hidden, index, s.offsets, s.count);
  const Tensor qkv = cpu::product(keys.x, qkv_weight, qkv_bias, /*gelu=*/false, keys.count);
  std::optional<FirstTokens> first;
  Rows queries = keys;
  Tensor query = qkv;
  if (first_only) {
    first.emplace(index, s);
    queries = gathered(hidden, first->slots.data(), first->offsets.data(),
                       static_cast<int64_t>(first->slots.size()));
    query = cpu::product(queries.x, *query_weight, query_bias, /*gelu=*/false, queries.count);
  }
  const int64_t key_column = first_only ? 0 : width;
  const Tensor context =
      attention(queries, keys, heads_from(query, 0, head_dim), heads_from(qkv, key_column, head_dim),
                heads_from(qkv, key_column + width, head_dim), s.batch, num_heads);

  const int64_t count = queries.count;
  const Tensor x = cpu::product(context, out_weight, out_bias, /*gelu=*/false, count);
  cpu::add_layer_norm_(x, nullptr, x, queries.x, nullptr, {norm1_weight, norm1_bias, norm1_eps}, count);
  const Tensor inner = cpu::product(x, ffn_in_weight, ffn_in_bias, gelu, count);
  check_projection(ffn_out_weight, ffn_out_bias, inner, width, "ffn_out_weight");
  const Tensor y = cpu::product(inner, ffn_out_weight, ffn_out_bias, /*gelu=*/false, count);
  cpu::add_layer_norm_(hidden, queries.slots, y, x, nullptr, {norm2_weight, norm2_bias, norm2_eps}, count);
}

}  // namespace

// For every device, like the operators of library_cpu_rows.cpp.
STABLE_TORCH_LIBRARY_IMPL(transkimmer, CompositeExplicitAutograd, m) {
  m.impl("skim_tokens.cpu", TORCH_BOX(&skim_tokens));
  m.impl("encoder_layer_.cpu", TORCH_BOX(&encoder_layer_));
}
