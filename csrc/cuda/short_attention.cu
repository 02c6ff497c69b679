// Softmax attention inside each of many short sequences, packed one behind the other:
//
//   P_ij = keep_j exp(S_ij) / sum_k keep_k exp(S_ik),   S = scale q k^T,   i and j of one sequence
//   out = P v,   lse_i = log sum_k keep_k exp(S_ik),   importance_j = sum over heads and i of P_ij
//
// Moves: q, k, v in and out back, 8 head_dim bytes per token and head; 4 more for lse. Computes 4 n^2
// head_dim FLOPs per sequence and head, n / 2 per byte: with n <= 128 it is bound by memory, and with the few
// thousand tokens of a batch by latency. So the kernel is built to have few dependent steps, and many blocks.
//
// Layout: a block takes a head and the sequences that start in a window of 64 keys (attention_plan.h), fewer
// than 64 + n in all where sequences may have up to n = 64, 96 or 128 keys, and keeps their k and v in
// shared memory, in rows padded by 16 bytes, which makes ldmatrix free of conflicts. A warp takes 16 query
// rows, whichever sequences they are of, and the keys of those sequences, as a rule 16 to 48. So sequences of
// any length fill the rows of the matrix instructions, and products that lie entirely outside the block
// diagonal are not computed. A row of scores stays in registers: the softmax takes one pass, and the column
// sums of P are at hand.
//
// Isolation: P is selected to be 0 outside a row's own sequence, never multiplied. That leaves 0 * v with a v
// that is not finite: such elements are replaced by 0 in shared memory and their keys noted, and the rows of
// their own sequence, no others, add them at the end.
//
// Importance is summed over rows in a fixed order (registers, lanes, warps) into one value per head and key;
// a second kernel adds up the heads, as deterministically. A counter by which the last block did that would
// have to be zeroed, which is another launch.
//
// Tried: eight warps in the shorter kind, whose 128 registers a thread spill; P packed to 16 bits before the
// first product, which spills more. Not taken: cp.async, since v passes through registers anyway and all
// loads of a thread are issued at once; one list of tiles of up to 128 rows, packed greedily, which fills 94
// instead of 89 % of the rows, and takes a scan before the first block can start.

#include "transkimmer/short_attention.cuh"

#include <cuda_runtime.h>

#include "cuda/short_attention_rows.cuh"

namespace transkimmer {
namespace {

// lower_bound by a whole block.
template <int kThreads>
__device__ int64_t block_lower_bound(const int32_t* values, int64_t n, int64_t target) {
  SearchStep step{0, n};
  while (step.first < step.last) {
    const int64_t probe = step.probe(kThreads, threadIdx.x);
    step = step.narrowed(kThreads, __syncthreads_count(probe < step.last && values[probe] < target));
  }
  return step.first;
}

// tile_sequences by a whole block, with one round trip to memory where there are at most 4 sequences to a
// thread.
template <int kThreads>
__device__ TileSequences block_tile_sequences(const int32_t* cu_seqlens_k, int64_t batch, int64_t start) {
  constexpr int kPerThread = 4;
  if (batch > kPerThread * kThreads) {
    const int64_t first = block_lower_bound<kThreads>(cu_seqlens_k, batch, start);
    const int64_t more =
        block_lower_bound<kThreads>(cu_seqlens_k + first, batch - first, start + kTileStride);
    return {first, first + more};
  }
  int64_t keys[kPerThread];  // before the thread's sequences
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t sequence = i * kThreads + static_cast<int64_t>(threadIdx.x);
    keys[i] = sequence < batch ? cu_seqlens_k[sequence] : start + kTileStride;
  }
  TileSequences found{0, 0};
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (i * kThreads >= batch) break;
    found.first += __syncthreads_count(keys[i] < start);
    found.last += __syncthreads_count(keys[i] < start + kTileStride);
  }
  return found;
}

// Sets to 0 what is not finite among two values; whether there was any.
template <class T>
__device__ bool make_finite(uint32_t& pair) {
  // Adding to an exponent of ones carries into the sign's place, and to no other exponent.
  constexpr uint32_t kBoth = T::kExponent << 16 | T::kExponent;
  constexpr uint32_t kOne = T::kLowestExponentBit << 16 | T::kLowestExponentBit;
  const uint32_t carries = ((pair & kBoth) + kOne) & 0x80008000u;
  if (carries & 0x8000u) pair &= 0xffff0000u;
  if (carries & 0x80000000u) pair &= 0x0000ffffu;
  return carries != 0;
}

// Keys and values of one head from `first_key` on into shared memory, zeros up to the next multiple of 16.
template <class T, class Tile>
__device__ void load_tile(Tile& tile, const ShortAttentionArguments& arguments, int64_t head,
                          int64_t first_key, int count) {
  constexpr int kThreads = Tile::kThreads;
  constexpr int kChunks = Tile::kHeadDim / 8;  // 16-byte pieces of a row
  constexpr int kPerThread = (Tile::kKeys * kChunks + kThreads - 1) / kThreads;
  const int thread = static_cast<int>(threadIdx.x);
  uint4 keys[kPerThread], values[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int key = (thread + i * kThreads) / kChunks, dim = (thread + i * kThreads) % kChunks * 8;
    keys[i] = values[i] = make_uint4(0, 0, 0, 0);
    if (key < count) {
      keys[i] = *reinterpret_cast<const uint4*>(element(arguments.k, first_key + key, head, dim));
      values[i] = *reinterpret_cast<const uint4*>(element(arguments.v, first_key + key, head, dim));
    }
  }
  if (thread < Tile::kKeys / 32) tile.not_finite[thread] = 0;
  for (int key = thread; key < Tile::kKeys; key += kThreads) {
    const bool weighted = arguments.keep != nullptr && key < count;
    tile.log_keep[key] = weighted ? log2f(arguments.keep[first_key + key]) : 0.0f;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int key = (thread + i * kThreads) / kChunks, dim = (thread + i * kThreads) % kChunks * 8;
    if (key >= (count + 15) / 16 * 16) break;
    uint4& v = values[i];
    const bool x = make_finite<T>(v.x), y = make_finite<T>(v.y), z = make_finite<T>(v.z),
               w = make_finite<T>(v.w);
    if (x || y || z || w) atomicOr(&tile.not_finite[key / 32], 1u << key % 32);
    *reinterpret_cast<uint4*>(&tile.keys[key * Tile::kRow + dim]) = keys[i];
    *reinterpret_cast<uint4*>(&tile.values[key * Tile::kRow + dim]) = v;
  }
  __syncthreads();
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    short_attention_kernel(ShortAttentionArguments arguments) {
  TRANSKIMMER_DYNAMIC_SHARED(shared);
  Tile& tile = *reinterpret_cast<Tile*>(shared);
  const int64_t head = blockIdx.y, start = int64_t{blockIdx.x} * kTileStride;
  // Behind the last key there may be sequences without keys, but only in the window that it ends in.
  if (start > arguments.cu_seqlens_k[arguments.batch]) return;
  const auto [first, last] =
      block_tile_sequences<Tile::kThreads>(arguments.cu_seqlens_k, arguments.batch, start);
  if (first == last) return;

  const Window window{{first, last}, arguments.cu_seqlens_q[first], arguments.cu_seqlens_k[first]};
  const int end_query = arguments.cu_seqlens_q[last];
  // More keys than fit: a sequence, the last of the tile, is longer than max_seqlen_k says, and loses some.
  const int listed = arguments.cu_seqlens_k[last] - window.first_key;
  const int count = listed < Tile::kKeys ? listed : Tile::kKeys;
  load_tile<T>(tile, arguments, head, window.first_key, count);
  const bool wants_importance = arguments.importance_by_head != nullptr;
  const int warp = threadIdx.x / 32;
  if (wants_importance) {
    for (int key = threadIdx.x % 32; key < Tile::kKeys; key += 32) tile.column_sums[warp][key] = 0;
    __syncwarp();
  }
  uint32_t not_finite = 0;
  for (const uint32_t bits : tile.not_finite) not_finite |= bits;

  for (int64_t row = int64_t{window.first_query} + warp * kTileRows; row < end_query;
       row += Tile::kWarps * kTileRows) {
    Rows<T, Tile> rows(arguments, window, static_cast<int>(row), end_query);
    rows.multiply_keys(arguments, tile, head);
    rows.normalise(arguments, head);
    if (wants_importance) rows.add_columns(tile.column_sums[warp]);
    rows.multiply_values(tile);
    if (not_finite) rows.add_not_finite(arguments, tile, window, head);
    rows.store(arguments, head);
  }
  if (!wants_importance) return;
  __syncthreads();
  for (int key = static_cast<int>(threadIdx.x); key < count; key += Tile::kThreads) {
    float sum = 0;
    for (int w = 0; w < Tile::kWarps; ++w) sum += tile.column_sums[w][key];
    arguments.importance_by_head[head * arguments.capacity_k + window.first_key + key] = sum;
  }
}

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads) sum_heads_kernel(ShortAttentionArguments arguments) {
  const int64_t key = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (key >= arguments.cu_seqlens_k[arguments.batch]) return;
  float sum = 0;
  for (int64_t head = 0; head < arguments.heads; ++head) {
    sum += arguments.importance_by_head[head * arguments.capacity_k + key];
  }
  arguments.importance[key] = sum;
}

template <class T, int kHeadDim, int kLongest>
cudaError_t launch(const ShortAttentionArguments& arguments, cudaStream_t stream) {
  using Shared = Tile<kHeadDim, kLongest>;
  static_assert(2 * (sizeof(Shared) + 1024) <= 163 * 1024, "two blocks share a multiprocessor, on sm_80 too");
  const auto kernel = short_attention_kernel<T, Shared>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(attention_tiles(arguments.capacity_k)),
                        static_cast<unsigned>(arguments.heads));
  config.blockDim = dim3(Shared::kThreads);
  config.dynamicSmemBytes = sizeof(Shared);
  config.stream = stream;
  error = cudaLaunchKernelEx(&config, kernel, arguments);
  if (error != cudaSuccess || arguments.importance == nullptr || arguments.capacity_k == 0) return error;
  config.gridDim = dim3(static_cast<unsigned>((arguments.capacity_k + kSumThreads - 1) / kSumThreads));
  config.blockDim = dim3(kSumThreads);
  config.dynamicSmemBytes = 0;
  return cudaLaunchKernelEx(&config, sum_heads_kernel, arguments);
}

template <class T, int kHeadDim>
cudaError_t launch(const ShortAttentionArguments& arguments, cudaStream_t stream) {
  if (arguments.max_seqlen_k <= kShortSequences[0])
    return launch<T, kHeadDim, kShortSequences[0]>(arguments, stream);
  if (arguments.max_seqlen_k <= kShortSequences[1])
    return launch<T, kHeadDim, kShortSequences[1]>(arguments, stream);
  return launch<T, kHeadDim, kShortSequences[2]>(arguments, stream);
}

template <class T>
cudaError_t launch(const ShortAttentionArguments& arguments, cudaStream_t stream) {
  switch (arguments.head_dim) {
    case 32:
      return launch<T, 32>(arguments, stream);
    case 64:
      return launch<T, 64>(arguments, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t short_attention(const ShortAttentionArguments& arguments, Float16 format, cudaStream_t stream) {
  if (arguments.max_seqlen_k > kLongestShortSequence) return cudaErrorInvalidValue;
  return format == Float16::kFp16 ? launch<Fp16>(arguments, stream) : launch<Bf16>(arguments, stream);
}

}  // namespace transkimmer
