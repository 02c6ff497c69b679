// Ragged attention on threads: the work is cut into pieces, which the threads pull.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "cpu_threads.h"
#include "transkimmer/cpu_kernels.h"
#include "transkimmer/cpu_schedule.h"

namespace transkimmer::cpu {

// Each thread pulls pieces from one counter until none is left.
template <typename Body>
void run_pieces(const AttentionPlan& plan, int64_t scratch_floats, const Body& body) {
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, plan.threads, 1, [&](int64_t, int64_t) {
    float* memory = scratch(scratch_floats);
    for (size_t i = next++; i < plan.pieces.size(); i = next++) body(plan.pieces[i], memory);
  });
}

inline void attend(const AttentionForwardArgs& args, DType dtype) {
  const bool importance = args.importance != nullptr;
  // A head's importance is summed by one owner, in one order.
  const AttentionPlan plan =
      plan_attention(args.shape, torch::stable::get_num_threads(), /*split_queries=*/!importance);
  const auto forward = kernels().attention_forward[static_cast<int>(dtype)];
  run_pieces(plan,
             kernels().attention_forward_scratch(args.shape, plan.max_queries, plan.max_keys, importance),
             [&](const AttentionPiece& piece, float* memory) { forward(args, piece, memory); });
}

}  // namespace transkimmer::cpu
