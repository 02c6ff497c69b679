// Registration of the CPU kernels with PyTorch through its stable ABI: checks, output tensors and threads.
// What the operators compute is documented with their schemas in transkimmer_kernels/ops. Those that go row
// by row are in library_cpu_rows.cpp, those made of several others in library_cpu_fused.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_attention.h"
#include "cpu_checks.h"
#include "cpu_norms.h"
#include "transkimmer/cpu_kernels.h"
#include "transkimmer/interface.h"

TRANSKIMMER_DESCRIBE_LIBRARY(cpu, "");

namespace {

namespace cpu = transkimmer::cpu;
using namespace cpu::checks;

// ---- Compaction ----

std::tuple<Tensor, Tensor> compact(const Tensor& keep, const Tensor& slots, const Tensor& cu_seqlens,
                                   bool keep_first) {
  check_dense(slots, "slots", 1, ScalarType::Int);
  check_dense(keep, "keep", 1, ScalarType::Bool);
  check_length(keep, "keep", slots.size(0));
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", slots.size(0));
  Tensor new_slots = torch::stable::new_empty(slots, slots.sizes());
  Tensor new_cu_seqlens = torch::stable::new_empty(cu_seqlens, cu_seqlens.sizes());
  cpu::compact(static_cast<const uint8_t*>(keep.const_data_ptr()),
               static_cast<const int32_t*>(slots.const_data_ptr()), s.offsets, s.batch, keep_first,
               static_cast<int32_t*>(new_slots.mutable_data_ptr()),
               static_cast<int32_t*>(new_cu_seqlens.mutable_data_ptr()));
  return {new_slots, new_cu_seqlens};
}

// ---- Ragged attention ----

struct AttentionInputs {
  cpu::AttentionShape shape;
  cpu::HeadView q, k, v;
  const float* keep;
  cpu::DType dtype;
};

AttentionInputs check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                const Tensor& cu_seqlens_k, double scale, const std::optional<Tensor>& keep) {
  AttentionInputs in;
  in.dtype = check_float(q, "q");
  const ScalarType dtype = q.scalar_type();
  check_tensor(q, "q", 3, dtype);
  check_tensor(k, "k", 3, dtype);
  const int64_t heads = q.size(1), head_dim = q.size(2);
  STD_TORCH_CHECK(head_dim > 0, "q has head_dim ", head_dim, "; it must be above 0");
  in.q = check_heads(q, "q", dtype, q.size(0), heads, head_dim);
  in.k = check_heads(k, "k", dtype, k.size(0), heads, head_dim);
  in.v = check_heads(v, "v", dtype, k.size(0), heads, head_dim);
  const Sequences sq = check_sequences(cu_seqlens_q, "cu_seqlens_q", q.size(0));
  const Sequences sk = check_sequences(cu_seqlens_k, "cu_seqlens_k", k.size(0));
  STD_TORCH_CHECK(sq.batch == sk.batch, "cu_seqlens_k has ", sk.batch + 1, " entries, cu_seqlens_q has ",
                  sq.batch + 1, "; they must agree");
  in.keep = nullptr;
  if (keep.has_value()) {
    check_dense(*keep, "keep", 1, ScalarType::Float);
    check_length(*keep, "keep", k.size(0));
    in.keep = static_cast<const float*>(keep->const_data_ptr());
  }
  in.shape = {sq.batch,  heads,      head_dim,   q.size(0),
              k.size(0), sq.offsets, sk.offsets, static_cast<float>(scale)};
  return in;
}

// Sum over heads of [heads, capacity], zero beyond the valid rows.
Tensor sum_heads(const Tensor& partial, const cpu::AttentionShape& shape) {
  Tensor sum = torch::stable::new_empty(partial, {shape.capacity_k});
  const int64_t count = shape.cu_seqlens_k[shape.batch];
  auto* out = static_cast<float*>(sum.mutable_data_ptr());
  cpu::kernels().sum_heads(static_cast<const float*>(partial.const_data_ptr()), shape.heads, shape.capacity_k,
                           0, count, out);
  std::fill(out + count, out + shape.capacity_k, 0.0f);
  return sum;
}

std::tuple<Tensor, Tensor, Tensor> ragged_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                    int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/,
                                                    double scale, const std::optional<Tensor>& keep,
                                                    bool return_importance) {
  const AttentionInputs in = check_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, keep);
  const cpu::AttentionShape& shape = in.shape;
  Tensor out = torch::stable::new_empty(q, {shape.capacity_q, shape.heads, shape.head_dim});
  Tensor lse = torch::stable::new_empty(q, {shape.heads, shape.capacity_q}, ScalarType::Float);
  Tensor importance = torch::stable::new_empty(q, {return_importance ? shape.heads * shape.capacity_k : 0},
                                               ScalarType::Float);
  cpu::AttentionForwardArgs args{shape, in.q, in.k, in.v, in.keep, out.mutable_data_ptr(), nullptr, nullptr};
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (return_importance) args.importance = static_cast<float*>(importance.mutable_data_ptr());

  cpu::attend(args, in.dtype);
  return {out, lse, return_importance ? sum_heads(importance, shape) : importance};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ragged_attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t /*max_seqlen_q*/,
    int64_t /*max_seqlen_k*/, double scale, const std::optional<Tensor>& keep) {
  const AttentionInputs in = check_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, keep);
  const cpu::AttentionShape& shape = in.shape;
  const auto like_q = [&](const Tensor& t, const char* name) {
    return check_heads(t, name, q.scalar_type(), shape.capacity_q, shape.heads, shape.head_dim);
  };
  check_dense(lse, "lse", 2, ScalarType::Float);
  STD_TORCH_CHECK(lse.size(0) == shape.heads && lse.size(1) == shape.capacity_q, "lse has shape ",
                  shape_of(lse), "; expected [", shape.heads, ", ", shape.capacity_q, "]");
  const bool with_keep = keep.has_value();
  Tensor grad_q = torch::stable::new_empty(q, {shape.capacity_q, shape.heads, shape.head_dim});
  Tensor grad_k = torch::stable::new_empty(k, {shape.capacity_k, shape.heads, shape.head_dim});
  Tensor grad_v = torch::stable::new_empty(v, {shape.capacity_k, shape.heads, shape.head_dim});
  Tensor grad_keep =
      torch::stable::new_empty(q, {with_keep ? shape.heads * shape.capacity_k : 0}, ScalarType::Float);
  const cpu::AttentionBackwardArgs args{
      shape,
      like_q(grad_out, "grad_out"),
      in.q,
      in.k,
      in.v,
      like_q(out, "out"),
      static_cast<const float*>(lse.const_data_ptr()),
      in.keep,
      grad_q.mutable_data_ptr(),
      grad_k.mutable_data_ptr(),
      grad_v.mutable_data_ptr(),
      with_keep ? static_cast<float*>(grad_keep.mutable_data_ptr()) : nullptr};

  const cpu::AttentionPlan plan =
      cpu::plan_attention(shape, torch::stable::get_num_threads(), /*split_queries=*/false);
  const cpu::Kernels& kernels = cpu::kernels();
  const auto backward = kernels.attention_backward[static_cast<int>(in.dtype)];
  cpu::run_pieces(plan, kernels.attention_backward_scratch(shape, plan.max_keys),
                  [&](const cpu::AttentionPiece& piece, float* memory) { backward(args, piece, memory); });
  cpu::zero_tail(grad_q, shape.cu_seqlens_q[shape.batch]);
  cpu::zero_tail(grad_k, shape.cu_seqlens_k[shape.batch]);
  cpu::zero_tail(grad_v, shape.cu_seqlens_k[shape.batch]);
  return {grad_q, grad_k, grad_v, with_keep ? sum_heads(grad_keep, shape) : grad_keep};
}

std::string isa() { return cpu::kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transkimmer, CPU, m) {
  m.impl("compact.cpu", TORCH_BOX(&compact));
  m.impl("ragged_attention.cpu", TORCH_BOX(&ragged_attention));
  m.impl("ragged_attention_backward.cpu", TORCH_BOX(&ragged_attention_backward));
}

STABLE_TORCH_LIBRARY(transkimmer_cpu, m) {
  m.def("isa() -> str");
  // Both in library_cpu_rows.cpp.
  m.def("takes_packed_weights() -> bool");
  m.def("pack_panels(Tensor weight) -> Tensor");
}

// isa() has no tensor to be dispatched by.
STABLE_TORCH_LIBRARY_IMPL(transkimmer_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
