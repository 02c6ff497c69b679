// Registers short_attention: see library_cuda.cpp.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "cuda_checks.h"
#include "transkimmer/short_attention.cuh"

namespace {

using namespace transkimmer::checks;

transkimmer::HeadsView check_heads(const char* name, const Tensor& x, const Tensor& q, int32_t device) {
  STD_TORCH_CHECK(x.dim() == 3, name, " must have 3 dimensions, got ", x.dim());
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), name, " must have the dtype of q");
  check_device(name, x, device);
  check_size(name, x.size(1), q.size(1));
  check_size(name, x.size(2), q.size(2));
  STD_TORCH_CHECK(x.size(0) <= kMost, name, " has ", x.size(0), " rows; at most 2^31 - 1 are allowed");
  STD_TORCH_CHECK(
      x.numel() == 0 || (x.stride(2) == 1 && x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0), name,
      " must be contiguous in its last dimension, with strides of rows and heads that are multiples of 8");
  check_aligned(name, x);
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}

std::tuple<Tensor, Tensor, Tensor> short_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                   const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                   int64_t max_seqlen_k, double scale,
                                                   const std::optional<Tensor>& keep,
                                                   bool return_importance) {
  const int32_t device = q.get_device_index();
  const transkimmer::Float16 format = check_float16("q", q);
  transkimmer::ShortAttentionArguments arguments{};
  arguments.q = check_heads("q", q, q, device);
  arguments.k = check_heads("k", k, q, device);
  arguments.v = check_heads("v", v, q, device);
  check_size("v", v.size(0), k.size(0));
  const int64_t heads = q.size(1), head_dim = q.size(2);
  STD_TORCH_CHECK(heads >= 1 && heads <= 65535, "q has ", heads, " heads; it must have 1 to 65535");
  STD_TORCH_CHECK(head_dim == 32 || head_dim == 64, "q has head_dim ", head_dim, "; it must be 32 or 64");
  STD_TORCH_CHECK(max_seqlen_k <= transkimmer::kLongestShortSequence, "max_seqlen_k is ", max_seqlen_k,
                  "; at most ", transkimmer::kLongestShortSequence, " keys are allowed");
  arguments.batch = check_offsets("cu_seqlens_q", cu_seqlens_q, device);
  check_size("cu_seqlens_k", check_offsets("cu_seqlens_k", cu_seqlens_k, device) + 1, arguments.batch + 1);
  if (keep.has_value()) {
    check_vector("keep", *keep, ScalarType::Float, device);
    check_size("keep", keep->numel(), k.size(0));
    arguments.keep = keep->const_data_ptr<float>();
  }

  const torch::stable::accelerator::DeviceGuard guard(device);
  const int64_t capacity_q = q.size(0), capacity_k = k.size(0), counted = return_importance ? capacity_k : 0;
  Tensor out = torch::stable::new_empty(q, {capacity_q, heads, head_dim});
  Tensor lse = torch::stable::new_empty(q, {heads, capacity_q}, ScalarType::Float);
  Tensor importance = torch::stable::new_empty(q, {counted}, ScalarType::Float);
  Tensor by_head = torch::stable::new_empty(q, {heads, counted}, ScalarType::Float);
  arguments.cu_seqlens_q = cu_seqlens_q.const_data_ptr<int32_t>();
  arguments.cu_seqlens_k = cu_seqlens_k.const_data_ptr<int32_t>();
  arguments.out = out.mutable_data_ptr();
  arguments.lse = lse.mutable_data_ptr<float>();
  arguments.importance_by_head = counted ? by_head.mutable_data_ptr<float>() : nullptr;
  arguments.importance = counted ? importance.mutable_data_ptr<float>() : nullptr;
  arguments.capacity_q = capacity_q;
  arguments.capacity_k = capacity_k;
  arguments.max_seqlen_k = max_seqlen_k;
  arguments.heads = static_cast<int>(heads);
  arguments.head_dim = static_cast<int>(head_dim);
  arguments.scale = static_cast<float>(scale);
  check_launch("ragged_attention", transkimmer::short_attention(arguments, format, current_stream(device)));
  return {out, lse, importance};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transkimmer_cuda, CUDA, library) {
  library.impl("short_attention", TORCH_BOX(&short_attention));
}
