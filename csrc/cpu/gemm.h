// Small fp32 matrix products C = A B (or C += A B) out of L1 and L2, and the packing that feeds them.
//
// The micro-kernel holds a tile of kTileRows x (kTileVecs * kLanes) of C in registers and walks the depth
// once: per step one load per vector of B and one broadcast per row of A, hence kTileRows fused multiply-adds
// per load. B is read in column panels of the tile's width, either packed one after the other or in place in
// a row-major matrix; its columns are padded to whole vectors, so that no tile has a ragged edge. Short last
// panels have their own instantiation, since after skimming a panel is rarely full.
#pragma once

#include "vec_math.h"

namespace transkimmer::cpu::TRANSKIMMER_ISA {

constexpr int kPanel = kTileVecs * kLanes;

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Right operand: panel p begins at data + p * panel_stride, its rows are row_stride apart.
struct RightOperand {
  const float* data;
  int64_t row_stride, panel_stride;
};
inline RightOperand row_major(const float* data, int64_t row_stride) { return {data, row_stride, kPanel}; }

// A(r, k) is a[r * lda + k], or a[k * lda + r] if kTransposed.
template <int kRows, int kVecs, bool kTransposed>
void gemm_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
               bool accumulate) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) acc[r][v] = accumulate ? load(c + r * ldc + v * kLanes) : zero();
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vec column[kVecs];
    for (int v = 0; v < kVecs; ++v) column[v] = load(b + k * ldb + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec x = set1(kTransposed ? a[k * lda + r] : a[r * lda + k]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(x, column[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
  }
}

// From run-time extents to the instantiation, the full tile first.
template <int kRows, int kVecs, bool kTransposed>
void gemm_dispatch(int rows, int vecs, const float* a, int64_t lda, const float* b, int64_t ldb,
                   int64_t depth, float* c, int64_t ldc, bool accumulate) {
  if constexpr (kVecs > 1) {
    if (vecs < kVecs) {
      return gemm_dispatch<kRows, kVecs - 1, kTransposed>(rows, vecs, a, lda, b, ldb, depth, c, ldc,
                                                          accumulate);
    }
  }
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return gemm_dispatch<kRows - 1, kVecs, kTransposed>(rows, vecs, a, lda, b, ldb, depth, c, ldc,
                                                          accumulate);
    }
  }
  gemm_tile<kRows, kVecs, kTransposed>(a, lda, b, ldb, depth, c, ldc, accumulate);
}

// At most kTileRows rows of C, all `columns` (a multiple of kLanes) columns.
template <bool kTransposed>
void gemm_strip(int rows, const float* a, int64_t lda, RightOperand b, int64_t depth, int64_t columns,
                float* c, int64_t ldc, bool accumulate) {
  for (int64_t j = 0; j < columns; j += kPanel, b.data += b.panel_stride) {
    const int vecs = static_cast<int>(smaller(columns - j, kPanel) / kLanes);
    gemm_dispatch<kTileRows, kTileVecs, kTransposed>(rows, vecs, a, lda, b.data, b.row_stride, depth, c + j,
                                                     ldc, accumulate);
  }
}

// Any number of rows, in strips of nearly equal height: 13 rows as 5 + 4 + 4, not as 6 + 6 + 1.
inline int64_t strip_count(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

template <bool kTransposed>
void gemm(int64_t rows, const float* a, int64_t lda, RightOperand b, int64_t depth, int64_t columns, float* c,
          int64_t ldc, bool accumulate) {
  const int64_t strips = strip_count(rows);
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t r = rows * s / strips, end = rows * (s + 1) / strips;
    gemm_strip<kTransposed>(static_cast<int>(end - r), a + (kTransposed ? r : r * lda), lda, b, depth,
                            columns, c + r * ldc, ldc, accumulate);
  }
}

// dst row-major [rows, padded(columns)] in fp32, times `factor`; the padding is zero.
template <typename T>
void pack_rows(const T* src, int64_t src_stride, int64_t rows, int64_t columns, float factor, float* dst) {
  const int64_t whole = columns / kLanes * kLanes, width = padded(columns);
  const Vec scale = set1(factor);
  for (int64_t i = 0; i < rows; ++i, src += src_stride, dst += width) {
    for (int64_t j = 0; j < whole; j += kLanes) store(dst + j, mul(load(src + j), scale));
    if (whole < columns) {
      store(dst + whole, mul(load_first(src + whole, static_cast<int>(columns - whole)), scale));
    }
  }
}

// The transpose of src [rows, columns] as a right operand of depth `columns`: packed panels of kPanel source
// rows (one narrower panel if that holds all). Missing source rows are zero.
inline int64_t transposed_floats(int64_t rows, int64_t columns) {
  return (rows + kPanel - 1) / kPanel * kPanel * columns;
}

template <typename T>
RightOperand pack_transposed(const T* src, int64_t src_stride, int64_t rows, int64_t columns, float* dst) {
  const RightOperand operand{dst, smaller(padded(rows), kPanel), kPanel * columns};
  for (int64_t i = 0; i < rows; i += kLanes) {
    float* out = dst + i / kPanel * operand.panel_stride + i % kPanel;
    const int valid_rows = static_cast<int>(smaller(rows - i, kLanes));
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int valid = static_cast<int>(smaller(columns - j, kLanes));
      Vec block[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        const T* p = src + (i + r) * src_stride + j;
        block[r] = r >= valid_rows ? zero() : valid == kLanes ? load(p) : load_first(p, valid);
      }
      transpose(block);
      for (int r = 0; r < kLanes; ++r) {
        if (r < valid) store(out + (j + r) * operand.row_stride, block[r]);
      }
    }
  }
  return operand;
}

// One row of fp32 to T, the first `columns` of it, times `factor`.
template <typename T>
void unpack_row(const float* src, int64_t columns, float factor, T* dst) {
  const int64_t whole = columns / kLanes * kLanes;
  const Vec scale = set1(factor);
  for (int64_t j = 0; j < whole; j += kLanes) store(dst + j, mul(load(src + j), scale));
  if (whole < columns)
    store_first(dst + whole, mul(load(src + whole), scale), static_cast<int>(columns - whole));
}

// Hands out consecutive cache-line aligned pieces of the scratch memory; with a null base it only measures.
struct Carver {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* p = base == nullptr ? nullptr : base + used;
    used += (floats + 15) / 16 * 16;
    return p;
  }
};

}  // namespace transkimmer::cpu::TRANSKIMMER_ISA
