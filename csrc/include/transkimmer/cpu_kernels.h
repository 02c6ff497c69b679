// Interface between the CPU kernels (csrc/cpu, no torch) and their callers: plain pointers, element
// strides and one table of functions per instruction set. Every kernel works on a range of its rows or on one
// piece of its work, so that the caller owns the threads and the scratch memory.
#pragma once

#include <cstdint>

namespace transkimmer::cpu {

enum class DType { kFloat32 = 0, kBFloat16 = 1 };

// A [rows, heads, head_dim] operand whose last dimension is contiguous; strides in elements.
struct HeadView {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
};

struct AttentionShape {
  int64_t batch, heads, head_dim;
  int64_t capacity_q, capacity_k;
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  float scale;
};

struct AttentionForwardArgs {
  AttentionShape shape;
  HeadView q, k, v;
  const float* keep;  // [capacity_k] or null
  void* out;          // [capacity_q, heads, head_dim]
  float* lse;         // [heads, capacity_q] or null
  float* importance;  // [heads, capacity_k], summed over heads by the caller, or null
};

struct AttentionBackwardArgs {
  AttentionShape shape;
  HeadView grad_out, q, k, v, out;
  const float* lse;                // [heads, capacity_q]
  const float* keep;               // [capacity_k] or null
  void *grad_q, *grad_k, *grad_v;  // contiguous, shapes of q, k, v
  float* grad_keep;                // [heads, capacity_k], summed over heads by the caller, or null
};

// Part of an attention: queries [query_begin, query_end) of one sequence, for heads [head_begin, head_end).
struct AttentionPiece {
  int64_t sequence;
  int64_t head_begin, head_end;
  int64_t query_begin, query_end;
};

// Rows of length `dim`; an index pointer that is null stands for the identity.
struct NormArgs {
  int64_t dim;
  float eps;
  const void *weight, *bias;
  const void* x;
  const int32_t* x_index;
  const void* residual;  // added to x before the normalisation; may be null
  const int32_t* residual_index;
  void* out;
  const int32_t* out_index;
  const void* addend;  // added to both; null where there is no residual
  const int32_t* addend_index;
};

struct GeluDotArgs {
  NormArgs norm;  // of x alone; out unused
  const void* out_weight;
  float out_bias;
  float* delta;
};

// y = activation(x weight^T + bias) on dense rows, with the weight [out, in] packed into panels.
struct ProductArgs {
  int64_t rows, in, out;
  const void* x;       // [rows, in]
  const void* panels;  // [product_panels(out), in, product_columns], of x's type, as pack_panels leaves them
  const void* bias;    // [out] or null
  bool gelu;
  void* y;  // [rows, out]
};

// Kernels of one instruction set; [2] is indexed by DType. `scratch` is 64-byte aligned and private to the
// thread.
struct Kernels {
  const char* isa;
  int64_t (*attention_forward_scratch)(const AttentionShape&, int64_t max_queries, int64_t max_keys,
                                       bool importance);
  void (*attention_forward[2])(const AttentionForwardArgs&, const AttentionPiece&, float* scratch);
  int64_t (*attention_backward_scratch)(const AttentionShape&, int64_t max_keys);
  void (*attention_backward[2])(const AttentionBackwardArgs&, const AttentionPiece&, float* scratch);
  void (*sum_heads)(const float* partial, int64_t heads, int64_t capacity, int64_t begin, int64_t end,
                    float* out);
  int64_t (*norm_scratch)(int64_t dim);
  void (*norm_rows[2])(const NormArgs&, int64_t begin, int64_t end, float* scratch);
  void (*norm_gelu_dot[2])(const GeluDotArgs&, int64_t begin, int64_t end, float* scratch);
  int64_t product_columns;                // output columns per panel
  bool (*product_paired[2])(int64_t in);  // whether a panel's rows lie in pairs
  void (*pack_panels[2])(const void* weight, int64_t out, int64_t in, int64_t begin, int64_t end,
                         void* panels);
  int64_t (*product_scratch[2])(const ProductArgs&);
  // Panels [begin, end) of the output.
  void (*product[2])(const ProductArgs&, int64_t begin, int64_t end, float* scratch);

  int64_t product_panels(int64_t out) const { return (out + product_columns - 1) / product_columns; }
};

// The table for this machine, chosen at the first call; the environment variable TRANSKIMMER_CPU_ISA
// (generic, avx2, avx512 or avx512bf16) overrides the choice. Throws std::runtime_error if that names
// something else, or an instruction set that this machine or this build does not have.
const Kernels& kernels();

// Stable removal of the entries whose byte in `keep` is 0; returns nothing, writes new_slots[0, kept) and all
// of new_cu_seqlens. The output may not overlap the inputs.
void compact(const uint8_t* keep, const int32_t* slots, const int32_t* cu_seqlens, int64_t batch,
             bool keep_first, int32_t* new_slots, int32_t* new_cu_seqlens);

// Row movement by index, `row_bytes` per row. scatter: inverse[r] is the source row of output row r, or -1
// for zeros.
void gather_rows(const char* x, const int32_t* slots, int64_t row_bytes, int64_t begin, int64_t end, char* y);
void scatter_rows(const char* x, const int32_t* inverse, int64_t row_bytes, int64_t begin, int64_t end,
                  char* y);

}  // namespace transkimmer::cpu
