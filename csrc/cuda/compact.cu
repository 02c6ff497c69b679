// Stable compaction of a ragged token list by a keep mask, in one pass over the list:
//
//   new_slots      = [slots[i] for i < n if kept(i)]       n = cu_seqlens[batch], read on the device
//   new_cu_seqlens = [number of kept i < cu_seqlens[b]]   kept(i) = keep[i], or i starts a sequence
//
// Moves: 1 byte of mask and 4 bytes of slot per position in, 4 bytes per survivor out. The offsets, 4 bytes
// per sequence, are read by every tile, from L2 after the first.
//
// Layout: a block takes a tile of 4096 positions and turns its mask into 128 words of 32 bits in shared
// memory. Once the words are scanned, the rank of any position is one table entry plus one popcount; that
// serves both survivors and offsets, and no single position is ever scanned. Lane i of a warp reads position
// 32 w + i, so loads are coalesced whatever the alignment of the tensors; slots are loaded together with the
// mask, before the wait for other tiles.
//
// Tiles: a block of a list of up to 16 tiles counts for itself what survives before its own, 16 positions to
// a load. That reads the mask again, from L2, and needs neither communication nor a workspace, whose zeros
// would take a launch of their own. More tiles use decoupled look-back (Merrill and Garland 2016): a tile
// publishes its own count at once, and its inclusive count as soon as it knows what lies before it; a warp
// inspects 32 predecessors at a time. Tiles are numbered in the order in which blocks start, so a block only
// ever waits for blocks that are already running. Counts are integers, so the order of arrival does not show
// in the result.

#include "transkimmer/compact.cuh"

#include <cuda_runtime.h>

#include <cuda/atomic>

namespace transkimmer {
namespace {

using AtomicState = cuda::atomic_ref<uint64_t, cuda::thread_scope_device>;
constexpr uint32_t kAllLanes = 0xffffffffu;

// Number of survivors before `tile`, from what its predecessors have published. Called by one whole warp.
__device__ uint32_t look_back(uint64_t* states, int64_t tile, uint32_t lane) {
  uint32_t before = 0;
  for (int64_t newest = tile - 1;; newest -= 32) {
    const int64_t index = newest - lane;
    uint64_t state = pack_tile(TileFlag::kInclusive, 0);  // before the first tile there is nothing
    if (index >= 0) {
      do {
        state = AtomicState(states[index]).load(cuda::memory_order_relaxed);
      } while (tile_flag(state) == TileFlag::kEmpty);
    }
    const uint32_t inclusive = __ballot_sync(kAllLanes, tile_flag(state) == TileFlag::kInclusive);
    // Counted: every tile back to the nearest one whose count already includes all that lies before it.
    const uint32_t nearest = inclusive ? static_cast<uint32_t>(__ffs(static_cast<int>(inclusive))) - 1 : 31;
    before += __reduce_add_sync(kAllLanes, lane <= nearest ? tile_count(state) : 0u);
    if (inclusive) return before;
  }
}

// offsets[w] = number of set bits before words[w], for w <= kWords. Called by one whole warp; returns the
// total.
template <int kWords>
__device__ uint32_t scan_words(const uint32_t* words, uint32_t* offsets, uint32_t lane) {
  constexpr int kPerLane = (kWords + 31) / 32;
  uint32_t own = 0;
  for (int i = 0; i < kPerLane; ++i) {
    const int word = static_cast<int>(lane) * kPerLane + i;
    if (word < kWords) own += __popc(words[word]);
  }
  uint32_t inclusive = own;
  for (uint32_t distance = 1; distance < 32; distance *= 2) {
    const uint32_t from_below = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += from_below;
  }
  uint32_t before = inclusive - own;
  for (int i = 0; i < kPerLane; ++i) {
    const int word = static_cast<int>(lane) * kPerLane + i;
    if (word >= kWords) break;
    offsets[word] = before;
    before += __popc(words[word]);
  }
  const uint32_t total = __shfl_sync(kAllLanes, inclusive, 31);
  if (lane == 0) offsets[kWords] = total;
  return total;
}

// How many of the positions before `start`, a multiple of 16, survive. Called by a whole block; `sums` has a
// word per warp.
template <int kThreads>
__device__ uint32_t count_before(const CompactArguments& arguments, int64_t start, uint32_t* sums) {
  const int64_t thread = threadIdx.x;
  // The mask may begin anywhere; before its first aligned position, and from the last one on, bytes are
  // taken.
  const int64_t head = (16 - reinterpret_cast<uintptr_t>(arguments.keep) % 16) % 16;
  const int64_t vectors = (start - head) / 16, tail = head + 16 * vectors;
  uint32_t own = 0;
  if (thread < head) own += arguments.keep[thread] != 0;
  if (thread < start - tail) own += arguments.keep[tail + thread] != 0;
#pragma unroll 4
  for (int64_t i = thread; i < vectors; i += kThreads) {
    const uint4 bytes = reinterpret_cast<const uint4*>(arguments.keep + head)[i];
    own += __popc(nonzero_bytes(bytes.x)) + __popc(nonzero_bytes(bytes.y)) + __popc(nonzero_bytes(bytes.z)) +
           __popc(nonzero_bytes(bytes.w));
  }
  if (arguments.keep_first) {
    for (int64_t b = thread; b < arguments.batch; b += kThreads) {
      const int64_t first = arguments.cu_seqlens[b];
      own += first < start && first < arguments.cu_seqlens[b + 1] && arguments.keep[first] == 0;
    }
  }
  own = __reduce_add_sync(kAllLanes, own);
  if (thread % 32 == 0) sums[thread / 32] = own;
  __syncthreads();
  uint32_t total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += sums[warp];
  return total;
}

template <int kThreads, int kWordsPerWarp>
__global__ void __launch_bounds__(kThreads) compact_kernel(CompactArguments arguments) {
  constexpr int kWords = kThreads / 32 * kWordsPerWarp;
  constexpr int64_t kTile = 32 * kWords;
  __shared__ uint32_t
      words[kWords + 1];  // the mask; the last word stays empty, for the position behind the tile
  __shared__ uint32_t offsets[kWords + 1];  // survivors of this tile before each word
  __shared__ int64_t shared_tile;
  __shared__ uint32_t shared_base, sums[kThreads / 32];

  const uint32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  uint64_t* const ticket = arguments.workspace;
  if (thread == 0) {
    shared_tile = ticket ? static_cast<int64_t>(AtomicState(*ticket).fetch_add(1, cuda::memory_order_relaxed))
                         : int64_t{blockIdx.x};
    words[kWords] = 0;
  }
  __syncthreads();
  const int64_t tile = shared_tile, start = tile * kTile, count = arguments.cu_seqlens[arguments.batch];
  // Nothing is there to keep, no offset falls here, and no tile that has work looks back this far.
  if (start > count) return;
  // An offset equal to the capacity may lie just behind the last tile, which then owns it.
  const int64_t end = start + kTile >= arguments.capacity ? start + kTile + 1 : start + kTile;

  int32_t slot[kWordsPerWarp];
#pragma unroll
  for (int i = 0; i < kWordsPerWarp; ++i) {
    const int word = static_cast<int>(warp) * kWordsPerWarp + i;
    const int64_t position = start + word * 32 + lane;
    const bool valid = position < count;
    slot[i] = valid ? arguments.slots[position] : 0;
    const uint32_t bits = __ballot_sync(kAllLanes, valid && arguments.keep[position] != 0);
    if (lane == 0) words[word] = bits;
  }
  __syncthreads();
  if (arguments.keep_first) {
    for (int64_t b = thread; b < arguments.batch; b += kThreads) {
      const int64_t first = arguments.cu_seqlens[b];
      if (first >= start && first < start + kTile && first < arguments.cu_seqlens[b + 1]) {
        atomicOr(&words[(first - start) / 32], 1u << (first - start) % 32);
      }
    }
    __syncthreads();
  }

  const uint32_t counted = ticket || tile == 0 ? 0 : count_before<kThreads>(arguments, start, sums);
  if (warp == 0) {
    const uint32_t own = scan_words<kWords>(words, offsets, lane);
    uint32_t before = counted;
    if (ticket) {
      uint64_t* const states = ticket + 1;
      if (lane == 0)
        AtomicState(states[tile]).store(pack_tile(TileFlag::kOwn, own), cuda::memory_order_relaxed);
      before = look_back(states, tile, lane);
      if (lane == 0) {
        AtomicState(states[tile])
            .store(pack_tile(TileFlag::kInclusive, before + own), cuda::memory_order_relaxed);
      }
    }
    if (lane == 0) shared_base = before;
  }
  __syncthreads();
  const uint32_t base = shared_base;

#pragma unroll
  for (int i = 0; i < kWordsPerWarp; ++i) {
    const int word = static_cast<int>(warp) * kWordsPerWarp + i;
    const uint32_t bits = words[word];
    if (bits >> lane & 1) {
      const int64_t rank = int64_t{base} + offsets[word] + __popc(bits & bits_below(lane));
      arguments.new_slots[rank] = slot[i];
    }
  }
  for (int64_t b = thread; b <= arguments.batch; b += kThreads) {
    const int64_t offset = arguments.cu_seqlens[b];
    if (offset < start || offset >= end) continue;
    const int64_t word = (offset - start) / 32;
    const uint32_t inside = __popc(words[word] & bits_below((offset - start) % 32));
    arguments.new_cu_seqlens[b] = static_cast<int32_t>(base + offsets[word] + inside);
  }
}

}  // namespace

cudaError_t compact(const CompactArguments& arguments, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(compact_tiles(arguments.capacity, kCompactTile)));
  config.blockDim = dim3(kCompactThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, compact_kernel<kCompactThreads, kCompactWordsPerWarp>, arguments);
}

}  // namespace transkimmer
