// 16-bit floating-point numbers and the matrix instructions on them (sm_80 and later). Everything that needs
// an intrinsic or PTX stands here, so that csrc/tests/cuda_emulation can replace exactly this file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace transkimmer {

// The two formats. Values travel as their bits, two of them in a word, the first one in the low half.
struct Fp16 {
  static constexpr uint32_t kExponent = 0x7c00, kLowestExponentBit = 0x0400;
};
struct Bf16 {
  static constexpr uint32_t kExponent = 0x7f80, kLowestExponentBit = 0x0080;
};

template <class T>
__device__ float2 unpack(uint32_t pair);
template <>
__device__ inline float2 unpack<Fp16>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ inline float2 unpack<Bf16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Rounds to nearest even.
template <class T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<Fp16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pack<Bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// d += a b, with a [16, 16] and b [16, 8]. Lane l holds, for r = l / 4 and c = 2 (l % 4):
//   a: (r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8), each with its neighbour to the right
//   b: (c, r), (c + 8, r), each with its neighbour below
//   d: (r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1)
template <class T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma<Fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices from shared memory; lanes 8 m .. 8 m + 7 point at the rows, of 16 bytes, of matrix m.
// Lane l receives of each matrix the pair at row l / 4, column 2 (l % 4).
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// The same of the transposed matrices.
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

}  // namespace transkimmer

// Shared memory whose size the launch gives.
#define TRANSKIMMER_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
