// Attention inside short sequences on CUDA. Contract and layout: csrc/cuda/short_attention.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "transkimmer/attention_plan.h"
#include "transkimmer/float16.h"

namespace transkimmer {

// [rows, heads, head_dim] with a contiguous last dimension; strides in elements, multiples of 8, and data
// aligned to 16 bytes.
struct HeadsView {
  const void* data;
  int64_t row_stride, head_stride;
};

struct ShortAttentionArguments {
  HeadsView q, k, v;
  const int32_t* cu_seqlens_q;  // [batch + 1], on the device, like
  const int32_t* cu_seqlens_k;  // [batch + 1]
  const float* keep;            // [capacity_k], a weight per key inside the softmax; null: all ones
  void* out;                    // [capacity_q, heads, head_dim]
  float* lse;                   // [heads, capacity_q]
  float* importance_by_head;    // [heads, capacity_k], workspace; null where no importance is asked for
  float* importance;            // [capacity_k]; null with the workspace
  int64_t capacity_q, capacity_k, batch;
  // Bound of a sequence's keys, at most kLongestShortSequence; a sequence that has more may lose some.
  int64_t max_seqlen_k;
  int heads, head_dim;  // at most 65535 heads of 32 or 64
  float scale;
};

// Enqueues the kernels and returns. Allocates nothing and never waits for the device: a graph can capture it.
cudaError_t short_attention(const ShortAttentionArguments& arguments, Float16 format, cudaStream_t stream);

}  // namespace transkimmer
