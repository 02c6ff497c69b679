// `compact` on tensors that have been checked: an operator, and the second half of another.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda_checks.h"
#include "transkimmer/compact.cuh"

namespace transkimmer {

inline std::tuple<checks::Tensor, checks::Tensor> compact_list(const checks::Tensor& keep,
                                                               const checks::Tensor& slots,
                                                               const checks::Tensor& cu_seqlens,
                                                               bool keep_first, int32_t device) {
  checks::Tensor new_slots = torch::stable::empty_like(slots);
  checks::Tensor new_cu_seqlens = torch::stable::empty_like(cu_seqlens);
  const int64_t words = compact_workspace(slots.numel(), kCompactTile);
  const checks::Tensor workspace = torch::stable::new_zeros(slots, {words}, checks::ScalarType::Long);
  CompactArguments arguments{};
  arguments.keep = static_cast<const uint8_t*>(keep.const_data_ptr());
  arguments.slots = slots.const_data_ptr<int32_t>();
  arguments.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  arguments.new_slots = new_slots.mutable_data_ptr<int32_t>();
  arguments.new_cu_seqlens = new_cu_seqlens.mutable_data_ptr<int32_t>();
  arguments.workspace = words ? static_cast<uint64_t*>(workspace.mutable_data_ptr()) : nullptr;
  arguments.capacity = slots.numel();
  arguments.batch = cu_seqlens.numel() - 1;
  arguments.keep_first = keep_first;
  checks::check_launch("compact", compact(arguments, checks::current_stream(device)));
  return {new_slots, new_cu_seqlens};
}

}  // namespace transkimmer
