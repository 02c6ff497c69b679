// y = activation(x W^T + bias) for few rows as for many: the products of an encoder layer, on weights packed
// once.
//
// Bytes: a thread owns output columns, hence a part of the weights that no other thread reads. They lie in
// panels of kProductColumns columns, in the order in which the micro-kernel consumes them. With few rows the
// weights come from DRAM at every call, since those of the other layers have passed through the caches in
// between, and there is as much to wait for as to compute: a panel's multiply-adds on 50 rows take about as
// long as its bytes. So while one block of a panel is multiplied, the next is fetched into L2, a line every
// few steps, and the rate falls little down to 50 rows. Many rows are cut into blocks of kRowBlock, enough
// for the weights to stream again for each of them.
//
// The micro-kernel is the one of gemm.h in another order: kProductRows rows of x, read in place, times one
// panel. A row's sums never depend on the other rows, nor on how many there are: same row, same bits.
#pragma once

#include "gemm.h"
#include "transkimmer/cpu_kernels.h"

namespace transkimmer::cpu::TRANSKIMMER_ISA {

// Two vectors wide, and as many rows as gemm.h has accumulators for: wider panels would be too few to share
// out among threads.
constexpr int kProductVecs = 2;
constexpr int kProductColumns = kProductVecs * kLanes;
constexpr int kProductRows = kTileRows * kTileVecs / kProductVecs;
// Columns of x, and rows of a panel, that are multiplied in one go. A block of a panel then stays in L1 while
// the rows pass, and adding up sums of blocks halves the rounding error of one long sum.
constexpr int64_t kDepthBlock = 256;
constexpr int64_t kRowBlock = 96;
// Unfinished sums, where there is more than one depth block: 128 KiB.
constexpr int64_t kSumFloats = 32 * 1024;
constexpr int64_t kLine = 64;

inline int64_t block_count(int64_t n, int64_t block) { return (n + block - 1) / block; }

// The block of weights that comes next, fetched evenly while this one is worked on: in `rows_per_step` of
// every kStep rows of a panel, kLinesPerRow lines.
struct Ahead {
  const char* next;
  const char* end;
  int64_t rows_per_step;
};
constexpr int kStep = 8;
template <typename T>
constexpr int64_t kLinesPerRow = (kProductColumns * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine;

// c [kRows, kProductColumns] = a b, or += a b.
template <int kRows, typename T>
void product_tile(const float* a, int64_t lda, const T* b, int64_t depth, float* c, int64_t ldc,
                  bool accumulate, Ahead& ahead) {
  Vec acc[kRows][kProductVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kProductVecs; ++v) acc[r][v] = zero();
  }
  const char* next = ahead.next;
  const int64_t fetching = ahead.rows_per_step;
  // One flat loop: with a loop of its own over the lines to be fetched, GCC keeps the sums in memory.
#pragma GCC unroll 8
  for (int64_t k = 0; k < depth; ++k, ++a, b += kProductColumns) {
    if (k % kStep < fetching) {
      // Past the end of the block it fetches a little of what follows: harmless, and cheaper than a
      // comparison.
      for (int64_t i = 0; i < kLinesPerRow<T>; ++i) {
        __builtin_prefetch(next + i * kLine, /*rw=*/0, /*locality=*/2);
      }
      next += kLinesPerRow<T> * kLine;
    }
    Vec column[kProductVecs];
    for (int v = 0; v < kProductVecs; ++v) column[v] = load(b + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec x = set1(a[r * lda]);
      for (int v = 0; v < kProductVecs; ++v) acc[r][v] = fma(x, column[v], acc[r][v]);
    }
  }
  ahead.next = next;
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kProductVecs; ++v) {
      float* sum = c + r * ldc + v * kLanes;
      store(sum, accumulate ? add(load(sum), acc[r][v]) : acc[r][v]);
    }
  }
}

// From the run-time row count to the instantiation, the full tile first.
template <int kRows, typename T>
void product_rows(int rows, const float* a, int64_t lda, const T* b, int64_t depth, float* c, int64_t ldc,
                  bool accumulate, Ahead& ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return product_rows<kRows - 1>(rows, a, lda, b, depth, c, ldc, accumulate, ahead);
    }
  }
  product_tile<kRows>(a, lda, b, depth, c, ldc, accumulate, ahead);
}

// What a thread is at: some rows of x in fp32, its panels, and the matrices behind them.
template <typename T>
struct ProductBlock {
  const ProductArgs& args;
  const float* x;  // [rows, lda]
  int64_t lda, row, rows;
  float* sums;  // [rows, panels * kProductColumns]

  const T* weights(int64_t panel, int64_t k) const {
    return static_cast<const T*>(args.panels) + (panel * args.in + k) * kProductColumns;
  }
};

// Bias, activation and the store of `rows` rows of one panel.
template <typename T>
void finish_columns(const ProductArgs& args, const float* sums, int64_t ld, int64_t row, int64_t rows,
                    int64_t column) {
  for (int64_t j = 0; j < kProductColumns && column + j < args.out; j += kLanes) {
    const int64_t left = args.out - column - j;
    const Vec bias =
        args.bias == nullptr ? zero() : load_part(static_cast<const T*>(args.bias) + column + j, left);
    for (int64_t r = 0; r < rows; ++r) {
      Vec value = add(load(sums + r * ld + j), bias);
      if (args.gelu) value = gelu(value);
      T* y = static_cast<T*>(args.y) + (row + r) * args.out + column + j;
      if (left >= kLanes) {
        store(y, value);
      } else {
        store_first(y, value, static_cast<int>(left));
      }
    }
  }
}

// The rows of `block` times columns [k, k + depth) of x of one panel, strip by strip; `next` is the block of
// weights to be fetched meanwhile.
template <typename T>
void multiply_panel(const ProductBlock<T>& block, int64_t panel, int64_t first_panel, int64_t panels,
                    int64_t k, int64_t depth, const T* next) {
  const int64_t strips = block_count(block.rows, kProductRows), ld = panels * kProductColumns;
  const bool last = k + depth == block.args.in;
  const int64_t bytes = depth * kProductColumns * static_cast<int64_t>(sizeof(T));
  Ahead ahead{reinterpret_cast<const char*>(next), reinterpret_cast<const char*>(next) + bytes,
              block_count(bytes / depth * kStep, strips * kLinesPerRow<T> * kLine)};
  float* sums = block.sums + (panel - first_panel) * kProductColumns;
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t r = block.rows * s / strips, rows = block.rows * (s + 1) / strips - r;
    if (ahead.next >= ahead.end) ahead.rows_per_step = 0;
    product_rows<kProductRows>(static_cast<int>(rows), block.x + r * block.lda + k, block.lda,
                               block.weights(panel, k), depth, sums + r * ld, ld, k > 0, ahead);
    if (last) {
      finish_columns<T>(block.args, sums + r * ld, ld, block.row + r, rows, panel * kProductColumns);
    }
  }
}

// Panels that are worked on together, depth block by depth block, while their sums are unfinished.
static_assert(kSumFloats >= kRowBlock * kProductColumns);
inline int64_t panel_group(int64_t rows, int64_t in) {
  return in <= kDepthBlock ? 1 : kSumFloats / (rows * kProductColumns);
}

template <typename T>
void multiply_block(const ProductBlock<T>& block, int64_t begin, int64_t end) {
  const int64_t in = block.args.in, group = panel_group(block.rows, in);
  for (int64_t first = begin; first < end; first += group) {
    const int64_t panels = smaller(end - first, group);
    for (int64_t k = 0; k < in; k += kDepthBlock) {
      const int64_t depth = smaller(in - k, kDepthBlock);
      for (int64_t panel = first; panel < first + panels; ++panel) {
        // After the last block of all comes the first one, for the next block of rows.
        const bool more_panels = panel + 1 < first + panels, more_depth = k + depth < in;
        const int64_t after = more_panels       ? panel + 1
                              : more_depth      ? first
                              : panel + 1 < end ? panel + 1
                                                : begin;
        const T* next = block.weights(after, more_panels ? k : more_depth ? k + depth : 0);
        multiply_panel(block, panel, first, panels, k, depth, next);
      }
    }
  }
}

struct ProductScratch {
  float *x, *sums;
};

// Any row block of a product of `rows` rows, in fp32 if it is not, and its unfinished sums.
inline ProductScratch carve_product(Carver& carver, const ProductArgs& args, bool widened) {
  const int64_t rows = smaller(args.rows, kRowBlock);
  ProductScratch s;
  s.x = carver.take(widened ? rows * padded(args.in) : 0);
  s.sums = carver.take(args.in <= kDepthBlock ? rows * kProductColumns : kSumFloats);
  return s;
}

template <typename T>
int64_t product_scratch(const ProductArgs& args) {
  Carver carver{nullptr};
  carve_product(carver, args, sizeof(T) < sizeof(float));
  return carver.used;
}

// Panels [begin, end) of the output, all rows.
template <typename T>
void product(const ProductArgs& args, int64_t begin, int64_t end, float* scratch) {
  Carver carver{scratch};
  const ProductScratch s = carve_product(carver, args, sizeof(T) < sizeof(float));
  const int64_t blocks = block_count(args.rows, kRowBlock);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = args.rows * b / blocks, rows = args.rows * (b + 1) / blocks - row;
    const T* x = static_cast<const T*>(args.x) + row * args.in;
    if constexpr (sizeof(T) < sizeof(float)) {
      pack_rows(x, args.in, rows, args.in, 1.0f, s.x);
      multiply_block<T>({args, s.x, padded(args.in), row, rows, s.sums}, begin, end);
    } else {
      multiply_block<T>({args, x, args.in, row, rows, s.sums}, begin, end);
    }
  }
}

// Panels [begin, end) of a weight [out, in]: panel p is [in, kProductColumns], columns beyond `out` zero.
template <typename T>
void pack_panels(const void* weight, int64_t out, int64_t in, int64_t begin, int64_t end, void* panels) {
  for (int64_t o = begin * kProductColumns; o < end * kProductColumns; o += kLanes) {
    T* dst = static_cast<T*>(panels) + o / kProductColumns * kProductColumns * in + o % kProductColumns;
    for (int64_t k = 0; k < in; k += kLanes) {
      Vec block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        block[r] = o + r < out ? load_part(static_cast<const T*>(weight) + (o + r) * in + k, in - k) : zero();
      }
      transpose(block);
      for (int64_t r = 0; r < smaller(in - k, kLanes); ++r) store(dst + (k + r) * kProductColumns, block[r]);
    }
  }
}

}  // namespace transkimmer::cpu::TRANSKIMMER_ISA
