// Threads and scratch memory of the CPU operators.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "transkimmer/cpu_kernels.h"

namespace transkimmer::cpu {

// Scratch memory of the calling thread, 64-byte aligned. It is kept between calls: fresh pages would cost
// more than the work on a short sequence.
inline float* scratch(int64_t floats) {
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

// body(begin, end) over [0, count); `work` is the least a thread should do, `per_row` the work of a row.
template <typename Body>
void parallel_rows(int64_t count, int64_t work, int64_t per_row, const Body& body) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, work / std::max<int64_t>(per_row, 1)), body);
}

}  // namespace transkimmer::cpu
