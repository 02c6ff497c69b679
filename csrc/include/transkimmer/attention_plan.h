// Which sequences share a tile of `short_attention`: arithmetic for host and device alike, covered by ctest.
//
// The rule is local: tile t takes the sequences whose first key lies in [t kTileStride, (t + 1) kTileStride).
// If no sequence has more than n keys, a tile has fewer than kTileStride + n of them, and any block finds its
// own sequences by two searches in cu_seqlens: there is no list of tiles to write or to wait for, no sequence
// is split, and the result does not depend on the order of blocks.
#pragma once

#include <cstdint>

#include "transkimmer/host_device.h"

namespace transkimmer {

constexpr int kTileStride = 64;
constexpr int kTileRows = 16;  // queries that one warp takes at a time, the height of a matrix instruction
// Longest sequences, in keys, that a kernel is compiled for; nothing longer is served. The shorter a kind,
// the fewer registers and the less shared memory a block takes.
constexpr int kShortSequences[] = {64, 96, 128};
constexpr int kLongestShortSequence = 128;
// Keys of a tile, rounded up to a multiple of 32.
TRANSKIMMER_HOST_DEVICE constexpr int tile_keys(int longest) { return kTileStride + longest; }

// Tiles of a launch. A sequence may start behind the last key, with no keys of its own.
TRANSKIMMER_HOST_DEVICE constexpr int64_t attention_tiles(int64_t capacity_k) {
  return capacity_k / kTileStride + 1;
}

// First index in [0, n) whose value is not below `target`; n if there is none. `values` do not decrease.
TRANSKIMMER_HOST_DEVICE constexpr int64_t lower_bound(const int32_t* values, int64_t n, int64_t target) {
  int64_t first = 0;
  while (n > 0) {
    const int64_t half = n / 2;
    if (values[first + half] < target) {
      first += half + 1;
      n -= half + 1;
    } else {
      n = half;
    }
  }
  return first;
}

struct TileSequences {
  int64_t first, last;  // [first, last)
};

TRANSKIMMER_HOST_DEVICE constexpr TileSequences tile_sequences(const int32_t* cu_seqlens_k, int64_t batch,
                                                               int64_t tile) {
  return {lower_bound(cu_seqlens_k, batch, tile * kTileStride),
          lower_bound(cu_seqlens_k, batch, (tile + 1) * kTileStride)};
}

// One step of a search by `threads` threads at once, for the answer that lies in [first, last]: each looks at
// the last value of a chunk, and the number of values below the target tells which chunk the answer is in.
struct SearchStep {
  int64_t first, last;
  TRANSKIMMER_HOST_DEVICE constexpr int64_t chunk(int64_t threads) const {
    return (last - first + threads - 1) / threads;
  }
  TRANSKIMMER_HOST_DEVICE constexpr int64_t probe(int64_t threads, int64_t thread) const {
    return first + (thread + 1) * chunk(threads) - 1;
  }
  TRANSKIMMER_HOST_DEVICE constexpr SearchStep narrowed(int64_t threads, int64_t chunks_below) const {
    const int64_t begin = first + chunks_below * chunk(threads), end = begin + chunk(threads) - 1;
    return {begin, end < last ? end : last};
  }
};

}  // namespace transkimmer
