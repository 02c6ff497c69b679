// The skim predictor's decision value for every listed row, in one kernel:
//
//   logit_i = w . GELU(LN2(W LN1(hidden[slots[i]]) + b)) + c   for i < n = cu_seqlens[batch], read on the
//   device
//
// or, instead, whether it is not below a threshold. Computes 2 width inner FLOPs per row; must move 2 width
// bytes per row in, 4 (or 1) out, and W once.
//
// Layout: a block takes 32 rows. Its 8 warps normalise four rows each into shared memory, where they stay,
// and then each warp multiplies all 32 by its own eighth of W's rows. So no element of W is needed by two
// warps of a block: it goes from memory straight to the registers of the lane that multiplies it, one step
// ahead of its use, and W is never staged. A lane loads 8 neighbouring elements of a row at once; which
// column of the product of matrices they stand for does not matter as long as both operands agree, so what
// `mma` calls columns (c, c + 1, c + 8, c + 9) are four neighbours here. The inner row never leaves the
// registers: three sums over it, across lanes by shuffles and across warps through shared memory, are all
// that LN2 and the dot product exchange. Statistics are taken in two passes over registers, in fp32; the
// inner row is not rounded.
//
// The price is that every block reads all of W, from L2: 144 KiB for 384 -> 192, and lost among the
// latencies. For 768 -> 768 it was 1.1 MiB and 34 us up to 2400 rows (H200), where three kernels of
// Triton's take 9 to 19; so this one serves narrow predictors only.

#include "transkimmer/skim_logit.cuh"

#include <cuda_runtime.h>

#include "transkimmer/mma.cuh"

namespace transkimmer {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRows = 32, kRowsPerWarp = kRows / kWarps;
constexpr int kPadding =
    32;  // elements between rows: 16-byte accesses of eight lanes then meet no bank twice
constexpr int kMaxChunks = 4;  // of 32 lanes times 8 elements, in a row

__device__ float sum_over_warp(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

template <class T>
__device__ void unpack8(const uint4& words, float (&x)[8]) {
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = unpack<T>(pairs[j]);
    x[2 * j] = pair.x;
    x[2 * j + 1] = pair.y;
  }
}

__device__ uint4 load8(const void* base, int64_t index) {
  return *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(base) + index);
}

// Mean and 1 / standard deviation of a row of which this lane holds `chunks`.
template <class T>
__device__ float2 row_statistics(const uint4 (&chunks)[kMaxChunks], int width, float eps) {
  const int lane = threadIdx.x % 32;
  float sum = 0, squares = 0, x[8];
#pragma unroll
  for (int i = 0; i < kMaxChunks; ++i) {  // chunks beyond the row are 0
    unpack8<T>(chunks[i], x);
    for (int j = 0; j < 8; ++j) sum += x[j];
  }
  const float mean = sum_over_warp(sum) / width;
#pragma unroll
  for (int i = 0; i < kMaxChunks; ++i) {
    if ((lane + 32 * i) * 8 >= width) break;
    unpack8<T>(chunks[i], x);
    for (int j = 0; j < 8; ++j) squares += (x[j] - mean) * (x[j] - mean);
  }
  return make_float2(mean, 1 / sqrtf(sum_over_warp(squares) / width + eps));
}

// LN1 of this warp's rows, from memory to shared memory; a row beyond the count is taken to be 0.
template <class T>
__device__ void normalise_rows(const SkimLogitArguments& arguments, int64_t first, int64_t count,
                               uint16_t* rows) {
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * kRowsPerWarp, width = arguments.width;
  uint4 chunks[kRowsPerWarp][kMaxChunks];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) {
    const bool valid = first + own + r < count;
    const int64_t slot = valid ? arguments.slots[first + own + r] : 0;
#pragma unroll
    for (int i = 0; i < kMaxChunks; ++i) {
      const int column = (lane + 32 * i) * 8;
      chunks[r][i] =
          valid && column < width ? load8(arguments.hidden, slot * width + column) : make_uint4(0, 0, 0, 0);
    }
  }
  float2 statistics[kRowsPerWarp];
#pragma unroll
  for (int r = 0; r < kRowsPerWarp; ++r) statistics[r] = row_statistics<T>(chunks[r], width, arguments.eps);
#pragma unroll
  for (int i = 0; i < kMaxChunks; ++i) {
    const int column = (lane + 32 * i) * 8;
    if (column >= width) break;
    float weight[8], bias[8], x[8];
    unpack8<T>(load8(arguments.norm1_weight, column), weight);
    unpack8<T>(load8(arguments.norm1_bias, column), bias);
#pragma unroll
    for (int r = 0; r < kRowsPerWarp; ++r) {
      unpack8<T>(chunks[r][i], x);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = (x[j] - statistics[r].x) * statistics[r].y * weight[j] + bias[j];
      *reinterpret_cast<uint4*>(rows + (own + r) * (width + kPadding) + column) =
          make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
    }
  }
}

// inner[m][block] += rows [16 m, 16 m + 16) times the transpose of 8 kBlocks rows of W, from `weight` on.
template <class T, int kBlocks>
__device__ void multiply(const uint16_t* rows, const uint16_t* weight, int width,
                         float (&inner)[kRows / 16][kBlocks][4]) {
  const int lane = threadIdx.x % 32, r = lane / 4, column = lane % 4 * 8;
  uint4 next[kBlocks];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) next[block] = load8(weight, (8 * block + r) * width + column);
#pragma unroll(2)
  for (int k = 0; k < width; k += 32) {
    uint4 w[kBlocks];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      w[block] = next[block];
      if (k + 32 < width) next[block] = load8(weight, (8 * block + r) * width + k + 32 + column);
    }
#pragma unroll
    for (int m = 0; m < kRows / 16; ++m) {
      const uint4 above = load8(rows, (16 * m + r) * (width + kPadding) + k + column);
      const uint4 below = load8(rows, (16 * m + r + 8) * (width + kPadding) + k + column);
      const uint32_t left[4] = {above.x, below.x, above.y, below.y},
                     right[4] = {above.z, below.z, above.w, below.w};
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        mma<T>(inner[m][block], left, w[block].x, w[block].y);
        mma<T>(inner[m][block], right, w[block].z, w[block].w);
      }
    }
  }
}

// Sums over the inner row, of each of the lane's rows: over the quad that shares the rows, then over the
// warps.
__device__ void sum_over_rows(float (&x)[kRows / 8], float (*partial)[kRows]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i) {
    x[i] += __shfl_xor_sync(kAllLanes, x[i], 1);
    x[i] += __shfl_xor_sync(kAllLanes, x[i], 2);
    if (lane % 4 == 0) partial[threadIdx.x / 32][8 * i + lane / 4] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i) {
    x[i] = 0;
    for (int warp = 0; warp < kWarps; ++warp) x[i] += partial[warp][8 * i + lane / 4];
  }
}

template <class T>
__device__ float2 load2(const void* base, int index) {
  return unpack<T>(*reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(base) + index));
}

// The rest of the predictor: from the lane's elements of the inner rows to the logits of its rows, less the
// bias.
template <class T, int kBlocks>
__device__ void finish_rows(const SkimLogitArguments& arguments, float (&inner)[kRows / 16][kBlocks][4],
                            float (&logit)[kRows / 8]) {
  __shared__ float partial[3][kWarps][kRows];
  const int first = threadIdx.x / 32 * 8 * kBlocks + threadIdx.x % 4 * 2;
  float mean[kRows / 8] = {}, scale[kRows / 8] = {};
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const float2 bias = load2<T>(arguments.fc_bias, first + 8 * block);
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      float* const pair = &inner[i / 2][block][i % 2 * 2];
      pair[0] += bias.x;
      pair[1] += bias.y;
      mean[i] += pair[0] + pair[1];
    }
  }
  sum_over_rows(mean, partial[0]);
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i) {
    mean[i] /= arguments.inner;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      float* const pair = &inner[i / 2][block][i % 2 * 2];
      pair[0] -= mean[i];
      pair[1] -= mean[i];
      scale[i] += pair[0] * pair[0] + pair[1] * pair[1];
    }
  }
  sum_over_rows(scale, partial[1]);
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i) {
    scale[i] = 1 / sqrtf(scale[i] / arguments.inner + arguments.eps);
    logit[i] = 0;
  }
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const float2 weight = load2<T>(arguments.norm2_weight, first + 8 * block);
    const float2 bias = load2<T>(arguments.norm2_bias, first + 8 * block);
    const float2 out = load2<T>(arguments.out_weight, first + 8 * block);
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const float* const pair = &inner[i / 2][block][i % 2 * 2];
      const float x = pair[0] * scale[i] * weight.x + bias.x, y = pair[1] * scale[i] * weight.y + bias.y;
      logit[i] += x * (0.5f + 0.5f * erff(x * 0.70710678f)) * out.x;
      logit[i] += y * (0.5f + 0.5f * erff(y * 0.70710678f)) * out.y;
    }
  }
  sum_over_rows(logit, partial[2]);
}

template <class T, int kBlocks>
__global__ void __launch_bounds__(kThreads) skim_logit_kernel(SkimLogitArguments arguments) {
  TRANSKIMMER_DYNAMIC_SHARED(shared);
  uint16_t* const rows = reinterpret_cast<uint16_t*>(shared);
  const int64_t first = int64_t{blockIdx.x} * kRows, count = arguments.cu_seqlens[arguments.batch];
  if (first >= count) return;
  normalise_rows<T>(arguments, first, count, rows);
  __syncthreads();

  float inner[kRows / 16][kBlocks][4] = {}, logit[kRows / 8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto* const weight =
      static_cast<const uint16_t*>(arguments.fc_weight) + warp * 8 * kBlocks * arguments.width;
  multiply<T, kBlocks>(rows, weight, arguments.width, inner);
  finish_rows<T, kBlocks>(arguments, inner, logit);
  if (warp != 0 || lane % 4 != 0) return;

  const float bias = unpack<T>(*static_cast<const uint16_t*>(arguments.out_bias)).x;
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i) {
    const int64_t row = first + 8 * i + lane / 4;
    if (row >= count) continue;
    const float value = logit[i] + bias;
    if (arguments.logit != nullptr) arguments.logit[row] = value;
    if (arguments.keep != nullptr) arguments.keep[row] = !(value < arguments.threshold);
  }
}

template <class T, int kBlocks>
cudaError_t launch(const SkimLogitArguments& arguments, cudaStream_t stream) {
  if (arguments.capacity == 0) return cudaSuccess;
  const auto kernel = skim_logit_kernel<T, kBlocks>;
  const int bytes = kRows * (arguments.width + kPadding) * 2;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((arguments.capacity + kRows - 1) / kRows));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace

cudaError_t skim_logit(const SkimLogitArguments& arguments, Float16 format, cudaStream_t stream) {
  if (!skim_logit_fits(arguments.width, arguments.inner)) return cudaErrorInvalidValue;
  constexpr int kBlocks = 192 / (8 * kWarps);
  return format == Float16::kFp16 ? launch<Fp16, kBlocks>(arguments, stream)
                                  : launch<Bf16, kBlocks>(arguments, stream);
}

}  // namespace transkimmer
