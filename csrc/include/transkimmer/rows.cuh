// gather_rows and scatter_rows on CUDA. Contract and layout: csrc/cuda/rows.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace transkimmer {

struct MoveRowsArguments {
  const void* source;
  void* target;
  const int32_t* slots;       // [capacity]
  const int32_t* cu_seqlens;  // [batch + 1]; the last entry, read on the device, counts the valid slots
  int64_t capacity, batch;
  int64_t row_bytes;
  int64_t target_rows;
};

// Both enqueue and return, allocate nothing and never wait for the device: a graph can capture them.
cudaError_t gather_rows(const MoveRowsArguments& arguments, cudaStream_t stream);
cudaError_t scatter_rows(const MoveRowsArguments& arguments, cudaStream_t stream);

}  // namespace transkimmer
