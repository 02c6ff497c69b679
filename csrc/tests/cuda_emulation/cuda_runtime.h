// Just enough of CUDA to step through a kernel on the host: a thread per CUDA thread, one block after the
// other. It shows that the arithmetic and the barriers are right (and lets sanitizers watch), not that a
// device is fast or orders memory as assumed. Blocks run in order, which `after_block` lets a test exploit to
// rearrange what later blocks will see.
#pragma once

#include <atomic>
#include <barrier>
#include <bit>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __shared__ static  // blocks run one at a time

struct dim3 {
  dim3(unsigned x = 1) : x(x) {}  // implicit, like CUDA's
  unsigned x;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};

namespace emulation {

struct Warp {
  std::barrier<> barrier{32};
  uint32_t values[32];
};
struct Block {
  explicit Block(unsigned threads) : barrier(threads), warps(threads / 32) {}
  std::barrier<> barrier;
  std::vector<Warp> warps;
};

inline thread_local Block* block;
inline thread_local uint32_t thread;
inline std::function<void()> after_block = [] {};

// Every lane contributes a value and then sees those of all; all 32 lanes have to take part.
template <class Read>
auto exchange(uint32_t value, Read read) {
  Warp& warp = block->warps[thread / 32];
  warp.values[thread % 32] = value;
  warp.barrier.arrive_and_wait();
  const auto result = read(warp.values);
  warp.barrier.arrive_and_wait();
  return result;
}

template <class Kernel, class Arguments>
void run(unsigned blocks, unsigned threads, Kernel kernel, const Arguments& arguments) {
  for (unsigned index = 0; index < blocks; ++index) {
    Block state(threads);
    std::vector<std::jthread> workers;
    for (unsigned t = 0; t < threads; ++t) {
      workers.emplace_back([&, t] {
        block = &state;
        thread = t;
        kernel(arguments);
      });
    }
    workers.clear();
    after_block();
  }
}

}  // namespace emulation

#define threadIdx dim3(emulation::thread)

inline void __syncthreads() { emulation::block->barrier.arrive_and_wait(); }
inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  return emulation::exchange(predicate, [](const uint32_t* values) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= values[lane] << lane;
    return bits;
  });
}
inline uint32_t __shfl_sync(uint32_t, uint32_t value, uint32_t lane) {
  return emulation::exchange(value, [=](const uint32_t* values) { return values[lane]; });
}
inline uint32_t __shfl_up_sync(uint32_t, uint32_t value, uint32_t distance) {
  const uint32_t lane = emulation::thread % 32;
  return emulation::exchange(
      value, [=](const uint32_t* values) { return values[lane < distance ? lane : lane - distance]; });
}
inline uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
  return emulation::exchange(value, [](const uint32_t* values) {
    uint32_t sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += values[lane];
    return sum;
  });
}
inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return bits ? std::countr_zero(static_cast<uint32_t>(bits)) + 1 : 0; }
inline uint32_t atomicOr(uint32_t* address, uint32_t bits) {
  return std::atomic_ref(*address).fetch_or(bits);
}

template <class Kernel, class Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, Kernel kernel, const Arguments& arguments) {
  emulation::run(config->gridDim.x, config->blockDim.x, kernel, arguments);
  return cudaSuccess;
}
