// Just enough of CUDA to step through a kernel on the host: every CUDA thread is a fiber, one block after the
// other. It shows that the arithmetic and the barriers are right (and lets sanitizers watch), not that a
// device is fast or orders memory as assumed. Fibers run in a shuffled order from barrier to barrier, so that
// a missing barrier shows. Blocks run in order, which `after_block` lets a test exploit to rearrange what
// later blocks will see.
#pragma once

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulation/fibers.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

#define threadIdx emulation::thread_index()
#define blockIdx emulation::block_index

struct float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline void __syncthreads() { emulation::sync_block(); }
inline int __syncthreads_count(bool predicate) { return emulation::count_block(predicate); }
inline int __syncthreads_or(bool predicate) { return emulation::count_block(predicate) > 0; }
inline void __syncwarp() {
  emulation::warp_collective(0, [](const auto&) { return [](int) { return 0; }; });
}
inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  return emulation::warp_collective(predicate, [](const auto& values) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= uint32_t{*values[lane]} << lane;
    return [=](int) { return bits; };
  });
}
// Every lane receives the value of the lane that `from(lane)` names.
template <class Value, class From>
Value emulated_shuffle(Value value, From from) {
  return emulation::warp_collective(
      value, [&](const auto& values) { return [&values, from](int lane) { return *values[from(lane)]; }; });
}
template <class Value>
Value __shfl_sync(uint32_t, Value value, uint32_t lane) {
  return emulated_shuffle(value, [=](int) { return lane; });
}
template <class Value>
Value __shfl_up_sync(uint32_t, Value value, uint32_t distance) {
  return emulated_shuffle(
      value, [=](int lane) { return lane < static_cast<int>(distance) ? lane : lane - distance; });
}
template <class Value>
Value __shfl_xor_sync(uint32_t, Value value, int mask) {
  return emulated_shuffle(value, [=](int lane) { return lane ^ mask; });
}
template <class Value, class Combine>
Value emulated_reduction(Value value, Combine combine) {
  return emulation::warp_collective(value, [&](const auto& values) {
    Value result = *values[0];
    for (int lane = 1; lane < 32; ++lane) result = combine(result, *values[lane]);
    return [=](int) { return result; };
  });
}
inline uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
  return emulated_reduction(value, std::plus<>{});
}
inline int __reduce_min_sync(uint32_t, int value) {
  return emulated_reduction(value, [](int a, int b) { return a < b ? a : b; });
}
inline int __reduce_max_sync(uint32_t, int value) {
  return emulated_reduction(value, [](int a, int b) { return a > b ? a : b; });
}

inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return bits ? std::countr_zero(static_cast<uint32_t>(bits)) + 1 : 0; }
inline uint32_t atomicOr(uint32_t* address, uint32_t bits) {
  return std::atomic_ref(*address).fetch_or(bits);
}
using std::isfinite;
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

template <class Kernel, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel,
                               const Arguments&... arguments) {
  emulation::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); }, config->dynamicSmemBytes);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}
