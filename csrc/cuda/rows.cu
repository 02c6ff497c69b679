// Row movement by slots, for i < n = cu_seqlens[batch], read on the device:
//
//   gather:  target[i] = source[slots[i]]          (rows at and beyond n stay unwritten)
//   scatter: target = 0, then target[slots[i]] = source[i]
//
// Moves each listed row in and out and 4 bytes of slot; scatter fills its target first, by a memset of its
// own. No arithmetic, so rows are bytes: one kernel per access size, the widest of 16, 8, 4, 2 and 1 bytes
// that divides the rows and both addresses.
//
// Layout: a row is taken by as many lanes as it has groups of four accesses, at most a warp. A lane issues
// its loads before its stores; short rows share a warp, so that a mask of one byte per row is not a warp per
// byte.

#include "transkimmer/rows.cuh"

#include <cuda_runtime.h>

namespace transkimmer {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;

// 2^log_lanes lanes to a row of `width` units, at most a warp.
template <class Unit, bool kScatter>
__global__ void __launch_bounds__(kThreads)
    move_rows_kernel(MoveRowsArguments arguments, int64_t width, int log_lanes) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int lanes = 1 << log_lanes;
  const int64_t i = thread >> log_lanes, lane = thread & (lanes - 1);
  if (i >= arguments.cu_seqlens[arguments.batch]) return;
  const int64_t slot = arguments.slots[i];
  const Unit* const source = static_cast<const Unit*>(arguments.source) + (kScatter ? i : slot) * width;
  Unit* const target = static_cast<Unit*>(arguments.target) + (kScatter ? slot : i) * width;
  for (int64_t first = lane; first < width; first += kInFlight * lanes) {
    Unit units[kInFlight] = {};
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (first + j * lanes < width) units[j] = source[first + j * lanes];
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (first + j * lanes < width) target[first + j * lanes] = units[j];
    }
  }
}

template <class Unit, bool kScatter>
cudaError_t launch(const MoveRowsArguments& arguments, cudaStream_t stream) {
  const int64_t width = arguments.row_bytes / static_cast<int64_t>(sizeof(Unit));
  int log_lanes = 0;
  while (log_lanes < 5 && (kInFlight << log_lanes) < width) ++log_lanes;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(((arguments.capacity << log_lanes) + kThreads - 1) / kThreads));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, move_rows_kernel<Unit, kScatter>, arguments, width, log_lanes);
}

template <bool kScatter>
cudaError_t move_rows(const MoveRowsArguments& arguments, cudaStream_t stream) {
  if (arguments.capacity == 0 || arguments.row_bytes == 0) return cudaSuccess;
  const uint64_t bits = reinterpret_cast<uintptr_t>(arguments.source) |
                        reinterpret_cast<uintptr_t>(arguments.target) |
                        static_cast<uint64_t>(arguments.row_bytes);
  if (bits % 16 == 0) return launch<uint4, kScatter>(arguments, stream);
  if (bits % 8 == 0) return launch<uint2, kScatter>(arguments, stream);
  if (bits % 4 == 0) return launch<uint32_t, kScatter>(arguments, stream);
  if (bits % 2 == 0) return launch<uint16_t, kScatter>(arguments, stream);
  return launch<uint8_t, kScatter>(arguments, stream);
}

}  // namespace

cudaError_t gather_rows(const MoveRowsArguments& arguments, cudaStream_t stream) {
  return move_rows<false>(arguments, stream);
}

cudaError_t scatter_rows(const MoveRowsArguments& arguments, cudaStream_t stream) {
  const auto bytes = static_cast<size_t>(arguments.target_rows * arguments.row_bytes);
  if (bytes == 0) return cudaSuccess;
  const cudaError_t error = cudaMemsetAsync(arguments.target, 0, bytes, stream);
  return error == cudaSuccess ? move_rows<true>(arguments, stream) : error;
}

}  // namespace transkimmer
