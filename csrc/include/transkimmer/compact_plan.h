// Arithmetic that the host and the device sides of `compact` share; no CUDA header is needed, so that ctest
// covers it.
#pragma once

#include <cstdint>

#include "transkimmer/host_device.h"

namespace transkimmer {

// Threads of a block, and 32-position words of the keep mask that one warp takes. Eight independent loads per
// lane cover the memory latency; 512 * 8 = 4096 positions per tile let a batch of 32 x 128 tokens finish in a
// single block.
constexpr int kCompactThreads = 512;
constexpr int kCompactWordsPerWarp = 8;
constexpr int kCompactTile = kCompactThreads * kCompactWordsPerWarp;  // warps * words * 32

// Number of tiles; an empty list still takes one, since the offsets have to be written.
TRANSKIMMER_HOST_DEVICE constexpr int64_t compact_tiles(int64_t capacity, int64_t tile) {
  return capacity <= tile ? 1 : (capacity + tile - 1) / tile;
}

// Up to so many tiles, a block counts for itself what survives before its own: 64 KiB of mask at most.
constexpr int64_t kCompactCounted = 16;

// 64-bit words of zeroed workspace: a ticket counter and one state per tile, or none where blocks count for
// themselves.
TRANSKIMMER_HOST_DEVICE constexpr int64_t compact_workspace(int64_t capacity, int64_t tile) {
  const int64_t tiles = compact_tiles(capacity, tile);
  return tiles <= kCompactCounted ? 0 : 1 + tiles;
}

// Bit 0 of every byte that is not zero. Higher bytes are shifted into bits 1 to 7 at most.
TRANSKIMMER_HOST_DEVICE constexpr uint32_t nonzero_bytes(uint32_t bytes) {
  bytes |= bytes >> 4;
  bytes |= bytes >> 2;
  bytes |= bytes >> 1;
  return bytes & 0x01010101u;
}

// What a tile has published: nothing yet, its own count, or the count of itself and all tiles before it. Flag
// and count share one word, so that a reader can never see one without the other and no fence is needed.
enum class TileFlag : uint32_t { kEmpty = 0, kOwn = 1, kInclusive = 2 };

TRANSKIMMER_HOST_DEVICE constexpr uint64_t pack_tile(TileFlag flag, uint32_t count) {
  return static_cast<uint64_t>(flag) << 32 | count;
}
TRANSKIMMER_HOST_DEVICE constexpr TileFlag tile_flag(uint64_t state) {
  return static_cast<TileFlag>(state >> 32);
}
TRANSKIMMER_HOST_DEVICE constexpr uint32_t tile_count(uint64_t state) { return static_cast<uint32_t>(state); }

// Bits of a word that lie below position `bit` (0..31).
TRANSKIMMER_HOST_DEVICE constexpr uint32_t bits_below(uint32_t bit) { return (uint32_t{1} << bit) - 1; }

}  // namespace transkimmer
