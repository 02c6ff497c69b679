// Registration of the CPU kernels with PyTorch through its stable ABI: checks, output tensors and threads.
// What the operators compute is documented with their schemas in transkimmer_kernels/ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu_checks.h"
#include "transkimmer/cpu_kernels.h"
#include "transkimmer/cpu_schedule.h"

namespace {

namespace cpu = transkimmer::cpu;
using namespace cpu::checks;

// ---- Memory and threads ----

// Scratch memory of the calling thread, 64-byte aligned. It is kept between calls: fresh pages would cost
// more than the work on a short sequence.
float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t capacity = 0;
  if (floats > capacity) {
    capacity = (floats + 1023) / 1024 * 1024;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, capacity * sizeof(float))));
    if (memory == nullptr) {
      capacity = 0;
      throw std::bad_alloc();
    }
  }
  return memory.get();
}

// Work per thread below which another thread does not pay, in bytes moved and in elements normalised (about
// 10 us).
constexpr int64_t kGrainBytes = 128 * 1024;
constexpr int64_t kGrainElements = 32 * 1024;

int64_t grain(int64_t work, int64_t per_row) {
  return std::max<int64_t>(1, work / std::max<int64_t>(per_row, 1));
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

// Each thread pulls pieces from one counter until none is left.
template <typename Body>
void run_pieces(const cpu::AttentionPlan& plan, int64_t scratch_floats, const Body& body) {
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, plan.threads, 1, [&](int64_t, int64_t) {
    float* memory = scratch(scratch_floats);
    for (size_t i = next++; i < plan.pieces.size(); i = next++) body(plan.pieces[i], memory);
  });
}

// ---- Compaction and row movement ----

std::tuple<Tensor, Tensor> compact(const Tensor& keep, const Tensor& slots, const Tensor& cu_seqlens,
                                   bool keep_first) {
  check_dense(slots, "slots", 1, ScalarType::Int);
  check_dense(keep, "keep", 1, ScalarType::Bool);
  check_length(keep, "keep", slots.size(0));
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", slots.size(0));
  Tensor new_slots = torch::stable::new_empty(slots, slots.sizes());
  Tensor new_cu_seqlens = torch::stable::new_empty(cu_seqlens, cu_seqlens.sizes());
  cpu::compact(static_cast<const bool*>(keep.const_data_ptr()),
               static_cast<const int32_t*>(slots.const_data_ptr()), s.offsets, s.batch, keep_first,
               static_cast<int32_t*>(new_slots.mutable_data_ptr()),
               static_cast<int32_t*>(new_cu_seqlens.mutable_data_ptr()));
  return {new_slots, new_cu_seqlens};
}

Tensor gather_rows(const Tensor& x, const Tensor& slots, const Tensor& cu_seqlens) {
  const RowShape shape = check_rows(x, slots.numel());
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", slots.numel());
  const int32_t* index = check_slots(slots, "slots", s.count, x.size(0));
  Tensor y = torch::stable::new_empty(x, shape.sizes);
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  torch::stable::parallel_for(0, s.count, grain(kGrainBytes, shape.bytes), [&](int64_t begin, int64_t end) {
    cpu::gather_rows(from, index, shape.bytes, begin, end, to);
  });
  return y;
}

Tensor scatter_rows(const Tensor& x, const Tensor& slots, const Tensor& cu_seqlens, int64_t num_rows) {
  STD_TORCH_CHECK(num_rows >= 0 && num_rows <= INT32_MAX, "num_rows is ", num_rows,
                  "; it must lie in [0, 2^31)");
  const RowShape shape = check_rows(x, num_rows);
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", x.size(0));
  const int32_t* index = check_slots(slots, "slots", s.count, num_rows);
  // Through the inverse of the index every output row is written exactly once, zeros included.
  auto* inverse = reinterpret_cast<int32_t*>(scratch(num_rows));
  std::fill(inverse, inverse + num_rows, -1);
  for (int64_t i = 0; i < s.count; ++i) inverse[index[i]] = static_cast<int32_t>(i);
  Tensor y = torch::stable::new_empty(x, shape.sizes);
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  torch::stable::parallel_for(0, num_rows, grain(kGrainBytes, shape.bytes), [&](int64_t begin, int64_t end) {
    cpu::scatter_rows(from, inverse, shape.bytes, begin, end, to);
  });
  return y;
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
  STD_TORCH_CHECK(head_dim > 0 && head_dim % 8 == 0, "q has head_dim ", head_dim,
                  "; it must be a multiple of 8");
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

  // A head's importance is summed by one owner, in one order.
  const cpu::AttentionPlan plan =
      cpu::plan_attention(shape, thread_count(), /*split_queries=*/!return_importance);
  const cpu::Kernels& kernels = cpu::kernels();
  const auto forward = kernels.attention_forward[static_cast<int>(in.dtype)];
  run_pieces(plan,
             kernels.attention_forward_scratch(shape, plan.max_queries, plan.max_keys, return_importance),
             [&](const cpu::AttentionPiece& piece, float* memory) { forward(args, piece, memory); });
  return {out, lse, return_importance ? sum_heads(importance, shape) : importance};
}

// The rows beyond the valid ones of a gradient that is otherwise written by the kernel.
void zero_tail(const Tensor& grad, int64_t count) {
  const int64_t capacity = grad.size(0);
  if (count == capacity) return;
  const int64_t row_bytes = grad.numel() / capacity * static_cast<int64_t>(grad.element_size());
  auto* data = static_cast<char*>(grad.mutable_data_ptr());
  std::fill(data + count * row_bytes, data + capacity * row_bytes, char{0});
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

  const cpu::AttentionPlan plan = cpu::plan_attention(shape, thread_count(), /*split_queries=*/false);
  const cpu::Kernels& kernels = cpu::kernels();
  const auto backward = kernels.attention_backward[static_cast<int>(in.dtype)];
  run_pieces(plan, kernels.attention_backward_scratch(shape, plan.max_keys),
             [&](const cpu::AttentionPiece& piece, float* memory) { backward(args, piece, memory); });
  zero_tail(grad_q, shape.cu_seqlens_q[shape.batch]);
  zero_tail(grad_k, shape.cu_seqlens_k[shape.batch]);
  zero_tail(grad_v, shape.cu_seqlens_k[shape.batch]);
  return {grad_q, grad_k, grad_v, with_keep ? sum_heads(grad_keep, shape) : grad_keep};
}

// ---- LayerNorm and what surrounds it ----

template <typename Body>
void for_rows(int64_t count, int64_t dim, const Body& body) {
  torch::stable::parallel_for(0, count, grain(kGrainElements, dim), [&](int64_t begin, int64_t end) {
    body(begin, end, scratch(cpu::kernels().norm_scratch(dim)));
  });
}

Tensor layer_norm_rows(const Tensor& x, const std::optional<Tensor>& slots, const Tensor& cu_seqlens,
                       const Tensor& weight, const Tensor& bias, double eps) {
  const cpu::DType dtype = check_float(x, "x");
  check_matrix(x, "x", x);
  const int64_t capacity = slots.has_value() ? slots->numel() : x.size(0);
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", capacity);
  Tensor y = torch::stable::new_empty(x, {capacity, x.size(1)});
  cpu::NormArgs args{};
  args.dim = x.size(1);
  args.eps = static_cast<float>(eps);
  args.weight = check_vector(weight, "weight", x);
  args.bias = check_vector(bias, "bias", x);
  args.x = x.const_data_ptr();
  args.x_index = check_slots(slots, "slots", s.count, x.size(0));
  args.out = y.mutable_data_ptr();
  const auto norm = cpu::kernels().norm_rows[static_cast<int>(dtype)];
  for_rows(s.count, args.dim,
           [&](int64_t begin, int64_t end, float* memory) { norm(args, begin, end, memory); });
  return y;
}

void add_layer_norm_(const Tensor& out, const std::optional<Tensor>& out_slots, const Tensor& x,
                     const Tensor& residual, const std::optional<Tensor>& residual_slots,
                     const Tensor& weight, const Tensor& bias, double eps, const Tensor& cu_seqlens) {
  const cpu::DType dtype = check_float(x, "x");
  cpu::NormArgs args{};
  args.x = check_matrix(x, "x", x);
  args.residual = check_matrix(residual, "residual", x);
  check_matrix(out, "out", x);
  args.out = out.mutable_data_ptr();
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", x.size(0));
  args.dim = x.size(1);
  args.eps = static_cast<float>(eps);
  args.weight = check_vector(weight, "weight", x);
  args.bias = check_vector(bias, "bias", x);
  args.residual_index = check_slots(residual_slots, "residual_slots", s.count, residual.size(0));
  args.out_index = check_slots(out_slots, "out_slots", s.count, out.size(0));
  const auto norm = cpu::kernels().norm_rows[static_cast<int>(dtype)];
  for_rows(s.count, args.dim,
           [&](int64_t begin, int64_t end, float* memory) { norm(args, begin, end, memory); });
}

Tensor layer_norm_gelu_dot(const Tensor& x, const Tensor& cu_seqlens, const Tensor& norm_weight,
                           const Tensor& norm_bias, double eps, const Tensor& out_weight,
                           const Tensor& out_bias) {
  const cpu::DType dtype = check_float(x, "x");
  cpu::GeluDotArgs args{};
  args.norm.x = check_matrix(x, "x", x);
  const Sequences s = check_sequences(cu_seqlens, "cu_seqlens", x.size(0));
  args.norm.dim = x.size(1);
  args.norm.eps = static_cast<float>(eps);
  args.norm.weight = check_vector(norm_weight, "norm_weight", x);
  args.norm.bias = check_vector(norm_bias, "norm_bias", x);
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
  const auto kernel = cpu::kernels().norm_gelu_dot[static_cast<int>(dtype)];
  for_rows(s.count, args.norm.dim,
           [&](int64_t begin, int64_t end, float* memory) { kernel(args, begin, end, memory); });
  return delta;
}

std::string isa() { return cpu::kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transkimmer, CPU, m) {
  m.impl("compact.cpu", TORCH_BOX(&compact));
  m.impl("gather_rows.cpu", TORCH_BOX(&gather_rows));
  m.impl("scatter_rows.cpu", TORCH_BOX(&scatter_rows));
  m.impl("ragged_attention.cpu", TORCH_BOX(&ragged_attention));
  m.impl("ragged_attention_backward.cpu", TORCH_BOX(&ragged_attention_backward));
}

STABLE_TORCH_LIBRARY(transkimmer_cpu, m) {
  m.def(
      "layer_norm_rows(Tensor x, Tensor? slots, Tensor cu_seqlens, Tensor weight, Tensor bias, float eps) -> "
      "Tensor");
  m.def(
      "layer_norm_gelu_dot(Tensor x, Tensor cu_seqlens, Tensor norm_weight, Tensor norm_bias, float eps, "
      "Tensor out_weight, Tensor out_bias) -> Tensor");
  m.def(
      "add_layer_norm_(Tensor(a!) out, Tensor? out_slots, Tensor x, Tensor residual, Tensor? residual_slots, "
      "Tensor weight, Tensor bias, float eps, Tensor cu_seqlens) -> ()");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(transkimmer_cpu, CPU, m) {
  m.impl("layer_norm_rows", TORCH_BOX(&layer_norm_rows));
  m.impl("layer_norm_gelu_dot", TORCH_BOX(&layer_norm_gelu_dot));
  m.impl("add_layer_norm_", TORCH_BOX(&add_layer_norm_));
}

// isa() has no tensor to be dispatched by.
STABLE_TORCH_LIBRARY_IMPL(transkimmer_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }
