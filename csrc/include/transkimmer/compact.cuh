// compact on CUDA: keep mask -> the shorter list of slots and its offsets. Contract and layout:
// csrc/cuda/compact.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "transkimmer/compact_plan.h"

namespace transkimmer {

struct CompactArguments {
  const uint8_t* keep;        // [capacity] bool, by list position
  const int32_t* slots;       // [capacity]
  const int32_t* cu_seqlens;  // [batch + 1]; the last entry, read on the device, counts the valid positions
  int32_t* new_slots;         // [capacity]; entries behind the last survivor stay unwritten
  int32_t* new_cu_seqlens;    // [batch + 1]
  uint64_t* workspace;        // compact_workspace(capacity, kCompactTile) zeroed words; null if that is 0
  int64_t capacity;           // < 2^31
  int64_t batch;
  bool keep_first;  // the first token of a non-empty sequence survives whatever its mask says
};

// Enqueues the kernel and returns. Allocates nothing and never waits for the device: a graph can capture it.
cudaError_t compact(const CompactArguments& arguments, cudaStream_t stream);

}  // namespace transkimmer
