// What one warp of short_attention.cu does, on the tile that its block has loaded.
#pragma once

#include "transkimmer/mma.cuh"
#include "transkimmer/short_attention.cuh"

namespace transkimmer {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct Range {
  int begin, end;
};

// Shared memory of a block, for heads of `kHeadDim_` and sequences of up to `kLongest` keys.
template <int kHeadDim_, int kLongest>
struct alignas(16) Tile {
  static constexpr int kHeadDim = kHeadDim_, kKeys = tile_keys(kLongest);
  static constexpr int kRow = kHeadDim + 8;  // elements from one key to the next
  // One round of rows holds most tiles of the shortest kind; the others' scores fill a warp's registers.
  static constexpr int kWarps = kLongest <= 64 ? 6 : 4, kThreads = 32 * kWarps;
  // That are to fit on a multiprocessor. Elsewhere than on sm_90, a third one would make the longer kinds
  // spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  static constexpr int kBlocks = kLongest <= 64 ? 2 : 3;
#else
  static constexpr int kBlocks = 2;
#endif

  uint16_t keys[kKeys * kRow], values[kKeys * kRow];
  float log_keep[kKeys];            // base 2
  uint32_t not_finite[kKeys / 32];  // keys whose values had an element replaced
  float column_sums[kWarps][kKeys];
};

__device__ const uint16_t* element(const HeadsView& view, int64_t row, int64_t head, int dim) {
  return static_cast<const uint16_t*>(view.data) + row * view.row_stride + head * view.head_stride + dim;
}

// Where the rows that a block works on begin and end, in queries and in keys.
struct Window {
  TileSequences sequences;
  int first_query, first_key;
};

// The keys, counted from the window's first, that query `row` of the batch attends to.
__device__ Range keys_of_row(const ShortAttentionArguments& arguments, const Window& window, int row) {
  const TileSequences s = window.sequences;
  // The last sequence that starts at or before the row; empty ones also start there, but come before it.
  const int64_t b =
      s.first + lower_bound(arguments.cu_seqlens_q + s.first, s.last - s.first, int64_t{row} + 1) - 1;
  return {arguments.cu_seqlens_k[b] - window.first_key, arguments.cu_seqlens_k[b + 1] - window.first_key};
}

// One warp's 16 query rows. Of them a lane holds, in the layout of `mma`, rows lane / 4 and lane / 4 + 8,
// here called its rows 0 and 1, and of each row the columns 2 (lane % 4) and the next one in every block
// of 8.
template <class T, class Tile>
struct Rows {
  static constexpr int kHeadDim = Tile::kHeadDim, kSteps = Tile::kKeys / 16;

  int row[2];            // in the batch
  bool valid[2];         // whether there is such a row
  Range keys[2];         // that it attends to
  int first_key, steps;  // what the whole warp goes through: `steps` times 16 keys
  float scores[2 * kSteps][4];
  float inverse_sum[2];
  float out[kHeadDim / 8][4];

  __device__ Rows(const ShortAttentionArguments& arguments, const Window& window, int first_row,
                  int end_row) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row[i] = first_row + lane / 4 + 8 * i;
      valid[i] = row[i] < end_row;
      keys[i] = valid[i] ? keys_of_row(arguments, window, row[i]) : Range{Tile::kKeys, 0};
      if (keys[i].end > Tile::kKeys) keys[i].end = Tile::kKeys;  // a bound that was too low
    }
    const int begin =
        __reduce_min_sync(kAllLanes, keys[0].begin < keys[1].begin ? keys[0].begin : keys[1].begin);
    const int end = __reduce_max_sync(kAllLanes, keys[0].end > keys[1].end ? keys[0].end : keys[1].end);
    first_key = begin / 16 * 16;
    steps = end > first_key ? (end - first_key + 15) / 16 : 0;
  }

  __device__ bool own(int i, int block, int column) const {
    const int key = first_key + 8 * block + threadIdx.x % 4 * 2 + column;
    return key >= keys[i].begin && key < keys[i].end;
  }

  // scores = scale q k^T + log keep, to base 2; -inf outside a row's own sequence.
  __device__ void multiply_keys(const ShortAttentionArguments& arguments, const Tile& tile, int64_t head) {
    const int lane = threadIdx.x % 32;
    uint32_t q[kHeadDim / 16][4];
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int dim = 16 * d + lane % 4 * 2 + j / 2 * 8;
        q[d][j] = valid[j % 2]
                      ? *reinterpret_cast<const uint32_t*>(element(arguments.q, row[j % 2], head, dim))
                      : 0u;
      }
    }
    const float scale = arguments.scale * kLog2E;
    const int key_of_lane = lane % 8 + lane / 16 * 8, dim_of_lane = lane / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step >= steps) break;
      float (&left)[4] = scores[2 * step], (&right)[4] = scores[2 * step + 1];
#pragma unroll
      for (int j = 0; j < 4; ++j) left[j] = right[j] = 0;
      const int first = first_key + 16 * step;
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        uint32_t k[4];
        load_matrices(k, &tile.keys[(first + key_of_lane) * Tile::kRow + 16 * d + dim_of_lane]);
        mma<T>(left, q[d], k[0], k[1]);
        mma<T>(right, q[d], k[2], k[3]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float& score = scores[2 * step + j / 4][j % 4];
        const float log_keep = tile.log_keep[first + j / 4 * 8 + lane % 4 * 2 + j % 2];
        score = own(j % 4 / 2, 2 * step + j / 4, j % 2) ? score * scale + log_keep : -INFINITY;
      }
    }
  }

  // scores become exp(score - maximum) and inverse_sum what makes P of them; writes lse.
  __device__ void normalise(const ShortAttentionArguments& arguments, int64_t head) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = -INFINITY;
#pragma unroll
      for (int block = 0; block < 2 * kSteps; ++block) {
        if (block >= 2 * steps) break;
        top = fmaxf(top, fmaxf(scores[block][2 * i], scores[block][2 * i + 1]));
      }
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float base = top == -INFINITY ? 0.0f : top;  // no key is kept: all powers are 0
      float sum = 0;
#pragma unroll
      for (int block = 0; block < 2 * kSteps; ++block) {
        if (block >= 2 * steps) break;
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          float& score = scores[block][2 * i + column];
          score = exp2f(score - base);
          sum += score;
        }
      }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      inverse_sum[i] = sum == 0 ? 0.0f : 1 / sum;
      if (valid[i] && threadIdx.x % 4 == 0) {
        arguments.lse[head * arguments.capacity_q + row[i]] =
            sum == 0 ? -INFINITY : (base + log2f(sum)) * kLn2;
      }
    }
  }

  __device__ void multiply_values(const Tile& tile) {
    const int lane = threadIdx.x % 32;
    const int key_of_lane = lane % 16, dim_of_lane = lane / 16 * 8;
#pragma unroll
    for (int block = 0; block < kHeadDim / 8; ++block) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[block][j] = 0;
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step >= steps) break;
      uint32_t p[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float (&block)[4] = scores[2 * step + j / 2];
        p[j] = pack<T>(block[j % 2 * 2], block[j % 2 * 2 + 1]);
      }
      const int key = first_key + 16 * step + key_of_lane;
#pragma unroll
      for (int d = 0; d < kHeadDim / 16; ++d) {
        uint32_t v[4];
        load_matrices_transposed(v, &tile.values[key * Tile::kRow + 16 * d + dim_of_lane]);
        mma<T>(out[2 * d], p, v[0], v[1]);
        mma<T>(out[2 * d + 1], p, v[2], v[3]);
      }
    }
#pragma unroll
    for (int block = 0; block < kHeadDim / 8; ++block) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[block][j] *= inverse_sum[j / 2];
    }
  }

  // Adds the values that are not finite, and were 0 in `multiply_values`, to the rows of their own sequence.
  __device__ void add_not_finite(const ShortAttentionArguments& arguments, const Tile& tile,
                                 const Window& window, int64_t head) {
#pragma unroll 1
    for (int key = first_key; key < first_key + 16 * steps; ++key) {
      if (!(tile.not_finite[key / 32] >> key % 32 & 1)) continue;
#pragma unroll
      for (int block = 0; block < kHeadDim / 8; ++block) {
        const int dim = 8 * block + threadIdx.x % 4 * 2;
        const float2 v = unpack<T>(
            *reinterpret_cast<const uint32_t*>(element(arguments.v, window.first_key + key, head, dim)));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (key < keys[i].begin || key >= keys[i].end) continue;
          if (!isfinite(v.x)) out[block][2 * i] += v.x;
          if (!isfinite(v.y)) out[block][2 * i + 1] += v.y;
        }
      }
    }
  }

  __device__ void store(const ShortAttentionArguments& arguments, int64_t head) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!valid[i]) continue;
      uint16_t* const target = static_cast<uint16_t*>(arguments.out) +
                               (int64_t{row[i]} * arguments.heads + head) * kHeadDim + threadIdx.x % 4 * 2;
#pragma unroll
      for (int block = 0; block < kHeadDim / 8; ++block) {
        *reinterpret_cast<uint32_t*>(target + 8 * block) = pack<T>(out[block][2 * i], out[block][2 * i + 1]);
      }
    }
  }

  // Adds these rows of P to the warp's own column sums.
  __device__ void add_columns(float* column_sums) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < 2 * kSteps; ++block) {
      if (block >= 2 * steps) break;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        float sum = 0;
        for (int i = 0; i < 2; ++i) {
          if (own(i, block, column)) sum += scores[block][2 * i + column] * inverse_sum[i];
        }
        for (int distance = 4; distance < 32; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
        if (lane < 4) column_sums[first_key + 8 * block + 2 * lane + column] += sum;
      }
    }
  }
};

}  // namespace
}  // namespace transkimmer
