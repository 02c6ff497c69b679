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
// panel. A row's sums never depend on the other rows, nor on how many there are: same row, same bits. Where
// the instruction set multiplies bf16 in pairs, a bf16 product takes two columns of x at a time (`Pairing`).
#pragma once

#include <utility>

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

constexpr int64_t block_count(int64_t n, int64_t block) { return (n + block - 1) / block; }

// What a step of the micro-kernel takes: kDepth columns of x, and as many rows of a panel of weights T.
// In fp32, into which other rows of x are widened beforehand:
template <typename T>
struct Widening {
  using Left = float;
  using Right = T;
  static constexpr int64_t kDepth = 1;
  static auto column(const Right* b) { return load(b); }
  static auto broadcast(const Left* a) { return set1(*a); }
  template <typename V>
  static Vec multiply_add(V a, V b, Vec sum) {
    return fma(a, b, sum);
  }
};
// In bf16 pairs: row k of a panel lies between the elements of row k + 1. For an even number of columns.
template <typename T>
struct Pairing {
  using Left = T;
  using Right = T;
  static constexpr int64_t kDepth = 2;
  static auto column(const Right* b) { return load_pairs(b); }
  static auto broadcast(const Left* a) { return set1_pair(a); }
  template <typename V>
  static Vec multiply_add(V a, V b, Vec sum) {
    return fma_pairs(a, b, sum);
  }
};
template <typename T>
constexpr bool is_paired(int64_t in) {
  return kHasPairs && sizeof(T) == sizeof(bf16) && in % 2 == 0;
}

// The block of weights that comes next, fetched evenly while this one is worked on: every step asks for as
// much as a step takes, then goes on by `stride` bytes, so that what the strips ask for overlaps.
struct Ahead {
  const char* next;
  int64_t stride;
};
// Steps in a loop's body. A branch around the fetch, or eight steps in a body, and a processor (Zen 5)
// fetches well or badly depending on where in memory the code lies: in some processes everything took twice
// as long. A step of a dozen multiply-adds is too short for a body, though.
constexpr int kTurn = kProductRows * kProductVecs >= 24 ? 1 : 2;
template <typename Form>
constexpr int64_t kStepBytes = kProductColumns * Form::kDepth * int64_t{sizeof(typename Form::Right)};
template <typename Form>
constexpr int kLinesPerStep = block_count(kStepBytes<Form>, kLine);

// f(0), ..., f(kCount - 1), with constants. GCC keeps an array in registers only where its indices are
// constants early on, so these are unrolled by the language and inlined by force: pragmas come too late.
#define TRANSKIMMER_INLINE __attribute__((always_inline))
template <typename F, int... kIndex>
TRANSKIMMER_INLINE inline void each_of(F&& f, std::integer_sequence<int, kIndex...>) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}
template <int kCount, typename F>
TRANSKIMMER_INLINE inline void each(F&& f) {
  each_of(f, std::make_integer_sequence<int, kCount>{});
}

// c [kRows, kProductColumns] = a b, or += a b.
template <int kRows, typename Form>
void product_tile(const typename Form::Left* a, int64_t lda, const typename Form::Right* b, int64_t depth,
                  float* c, int64_t ldc, bool accumulate, Ahead& ahead) {
  Vec acc[kRows][kProductVecs];
  const auto each_sum = [](auto f) TRANSKIMMER_INLINE {
    each<kRows>([&](auto r)
                    TRANSKIMMER_INLINE { each<kProductVecs>([&](auto v) TRANSKIMMER_INLINE { f(r, v); }); });
  };
  each_sum([&](auto r, auto v) TRANSKIMMER_INLINE { acc[r][v] = zero(); });
  // Rows are addressed from every third one, plus 0, 1 or 2 lda, which costs nothing on x86: pointers to all
  // of them would not fit into its registers. The asm keeps GCC from deriving them from each other again.
  constexpr int kBases = (kRows + 2) / 3;
  const typename Form::Left* base[kBases];
  each<kBases>([&](auto i) TRANSKIMMER_INLINE {
    base[i] = a + 3 * i * lda;
    asm("" : "+r"(base[i]));
  });
  const auto step = [&](int64_t k) TRANSKIMMER_INLINE {
    decltype(Form::column(b)) column[kProductVecs];
    each<kProductVecs>([&](auto v)
                           TRANSKIMMER_INLINE { column[v] = Form::column(b + v * kLanes * Form::kDepth); });
    each<kRows>([&](auto r) TRANSKIMMER_INLINE {
      const auto x = Form::broadcast(base[r / 3] + k * Form::kDepth + r % 3 * lda);
      each<kProductVecs>([&](auto v)
                             TRANSKIMMER_INLINE { acc[r][v] = Form::multiply_add(x, column[v], acc[r][v]); });
    });
    b += Form::kDepth * kProductColumns;
  };
  const auto advance = [&](int64_t count) TRANSKIMMER_INLINE {
    each<kBases>([&](auto i) TRANSKIMMER_INLINE { base[i] += count * Form::kDepth; });
  };
  const char* next = ahead.next;
  const int64_t stride = ahead.stride;
  int64_t left = depth / Form::kDepth;
  for (; left >= kTurn; left -= kTurn) {
    each<kTurn>([&](auto i) TRANSKIMMER_INLINE {
      // Past the end of the block it fetches a little of what follows: harmless, cheaper than a comparison.
      each<kLinesPerStep<Form>>([&](auto line) TRANSKIMMER_INLINE {
        __builtin_prefetch(next + line * kLine, /*rw=*/0, /*locality=*/2);
      });
      next += stride;
      step(i);
    });
    advance(kTurn);
  }
  for (; left > 0; --left) {
    step(0);
    advance(1);
  }
  ahead.next = next;
  const auto sum = [&](int r, int v) TRANSKIMMER_INLINE { return c + r * ldc + v * kLanes; };
  if (accumulate) {
    each_sum([&](auto r, auto v) TRANSKIMMER_INLINE { acc[r][v] = add(load(sum(r, v)), acc[r][v]); });
  }
  each_sum([&](auto r, auto v) TRANSKIMMER_INLINE { store(sum(r, v), acc[r][v]); });
}

// From the run-time row count to the instantiation, the full tile first.
template <int kRows, typename Form>
void product_rows(int rows, const typename Form::Left* a, int64_t lda, const typename Form::Right* b,
                  int64_t depth, float* c, int64_t ldc, bool accumulate, Ahead& ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return product_rows<kRows - 1, Form>(rows, a, lda, b, depth, c, ldc, accumulate, ahead);
    }
  }
  product_tile<kRows, Form>(a, lda, b, depth, c, ldc, accumulate, ahead);
}

// What a thread is at: some rows of x, its panels, and the matrices behind them.
template <typename Form>
struct ProductBlock {
  using T = typename Form::Right;
  const ProductArgs& args;
  const typename Form::Left* x;  // [rows, lda]
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
template <typename Form>
void multiply_panel(const ProductBlock<Form>& block, int64_t panel, int64_t first_panel, int64_t panels,
                    int64_t k, int64_t depth, const typename Form::Right* next) {
  const int64_t strips = block_count(block.rows, kProductRows), ld = panels * kProductColumns;
  const bool last = k + depth == block.args.in;
  Ahead ahead{reinterpret_cast<const char*>(next), block_count(kStepBytes<Form>, strips)};
  float* sums = block.sums + (panel - first_panel) * kProductColumns;
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t r = block.rows * s / strips, rows = block.rows * (s + 1) / strips - r;
    product_rows<kProductRows, Form>(static_cast<int>(rows), block.x + r * block.lda + k, block.lda,
                                     block.weights(panel, k), depth, sums + r * ld, ld, k > 0, ahead);
    if (last) {
      finish_columns<typename Form::Right>(block.args, sums + r * ld, ld, block.row + r, rows,
                                           panel * kProductColumns);
    }
  }
}

// Panels that are worked on together, depth block by depth block, while their sums are unfinished.
static_assert(kSumFloats >= kRowBlock * kProductColumns);
inline int64_t panel_group(int64_t rows, int64_t in) {
  return in <= kDepthBlock ? 1 : kSumFloats / (rows * kProductColumns);
}

template <typename Form>
void multiply_block(const ProductBlock<Form>& block, int64_t begin, int64_t end) {
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
        const auto* next = block.weights(after, more_panels ? k : more_depth ? k + depth : 0);
        multiply_panel(block, panel, first, panels, k, depth, next);
      }
    }
  }
}

struct ProductScratch {
  float *x, *sums;
};

// Any row block of a product of `rows` rows, in fp32 where it is to be widened, and its unfinished sums.
template <typename T>
ProductScratch carve_product(Carver& carver, const ProductArgs& args) {
  const int64_t rows = smaller(args.rows, kRowBlock);
  const bool widened = sizeof(T) < sizeof(float) && !is_paired<T>(args.in);
  ProductScratch s;
  s.x = carver.take(widened ? rows * padded(args.in) : 0);
  s.sums = carver.take(args.in <= kDepthBlock ? rows * kProductColumns : kSumFloats);
  return s;
}

template <typename T>
int64_t product_scratch(const ProductArgs& args) {
  Carver carver{nullptr};
  carve_product<T>(carver, args);
  return carver.used;
}

// Panels [begin, end) of the output, all rows.
template <typename T>
void product(const ProductArgs& args, int64_t begin, int64_t end, float* scratch) {
  Carver carver{scratch};
  const ProductScratch s = carve_product<T>(carver, args);
  const int64_t blocks = block_count(args.rows, kRowBlock);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = args.rows * b / blocks, rows = args.rows * (b + 1) / blocks - row;
    const T* x = static_cast<const T*>(args.x) + row * args.in;
    if constexpr (sizeof(T) == sizeof(float)) {
      multiply_block<Widening<T>>({args, x, args.in, row, rows, s.sums}, begin, end);
    } else {
      if constexpr (kHasPairs) {
        if (is_paired<T>(args.in)) {
          multiply_block<Pairing<T>>({args, x, args.in, row, rows, s.sums}, begin, end);
          continue;
        }
      }
      pack_rows(x, args.in, rows, args.in, 1.0f, s.x);
      multiply_block<Widening<T>>({args, s.x, padded(args.in), row, rows, s.sums}, begin, end);
    }
  }
}

// kLanes elements of row k of a panel, in `column` of it.
template <typename T>
void store_panel_row(T* panel, int64_t k, int64_t column, Vec row, bool paired) {
  if (!paired) return store(panel + k * kProductColumns + column, row);
  T elements[kLanes];
  store(elements, row);
  T* first = panel + (k / 2 * kProductColumns + column) * 2 + k % 2;
  for (int i = 0; i < kLanes; ++i) first[2 * i] = elements[i];
}

// Panels [begin, end) of a weight [out, in]: panel p is [in, kProductColumns], or, where rows are paired,
// [in / 2, kProductColumns, 2]; columns beyond `out` are zero.
template <typename T>
void pack_panels(const void* weight, int64_t out, int64_t in, int64_t begin, int64_t end, void* panels) {
  for (int64_t o = begin * kProductColumns; o < end * kProductColumns; o += kLanes) {
    T* panel = static_cast<T*>(panels) + o / kProductColumns * kProductColumns * in;
    for (int64_t k = 0; k < in; k += kLanes) {
      Vec block[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        block[r] = o + r < out ? load_part(static_cast<const T*>(weight) + (o + r) * in + k, in - k) : zero();
      }
      transpose(block);
      for (int64_t r = 0; r < smaller(in - k, kLanes); ++r) {
        store_panel_row(panel, k + r, o % kProductColumns, block[r], is_paired<T>(in));
      }
    }
  }
}

}  // namespace transkimmer::cpu::TRANSKIMMER_ISA
