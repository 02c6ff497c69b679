// 4 floats, in the vector extension of GCC and Clang, for machines without AVX2 (any architecture).
//
// vec_avx2.h and vec_avx512.h offer the same interface: Vec, kLanes, the register tile kTileRows x kTileVecs
// of the matrix product, arithmetic by name, and for T = float and bf16
//   load(p), store(p, a)                    all lanes, any alignment
//   load_first(p, n), store_first(p, a, n)  the first n < kLanes lanes; touches no memory beyond them, loads
//                                           zeros
//   first_or(a, n, other)                   the first n lanes of a, the rest of `other`
//   where_positive(x, a, other)             by lane
//   copy_sign(a, sign)                      |a| with the sign of `sign`, by lane
//   max(a, b), min(a, b)                    b where either is a NaN
//   scale_by_power_of_two(a, n)             a * 2^n for integral n, 0 where that underflows
//   transpose(r)                            kLanes x kLanes, in place
// and, if kHasPairs, for products of bf16 two at a time,
//   load_pairs(p), set1_pair(p)             kLanes pairs, or one pair kLanes times
//   fma_pairs(a, b, c)                      c + a0 b0 + a1 b1 by lane
// Everything lies in a namespace per instruction set, and these files use no function of the standard
// library: the linker keeps one copy of an inline function, and it could be the one compiled for AVX-512.
#pragma once

#include "bf16.h"

namespace transkimmer::cpu::TRANSKIMMER_ISA {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kTileRows = 4;
constexpr int kTileVecs = 2;

inline Vec set1(float x) { return Vec{x, x, x, x}; }
inline Vec zero() { return set1(0.0f); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec abs(Vec a) { return (Vec)((IntVec)a & INT32_MAX); }
inline Vec copy_sign(Vec a, Vec sign) { return (Vec)((IntVec)abs(a) | ((IntVec)sign & INT32_MIN)); }
// Adding 1.5 * 2^23 leaves no bits for a fraction; exact for |a| < 2^22.
inline Vec round(Vec a) { return (a + 12582912.0f) - 12582912.0f; }
inline Vec scale_by_power_of_two(Vec a, Vec n) {
  const Vec bounded = min(max(n, set1(-127.0f)), set1(128.0f));
  const IntVec bits = (__builtin_convertvector(bounded, IntVec) + 127) << 23;
  Vec power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return a * power;
}
inline float sum_lanes(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float max_lanes(Vec a) {
  const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}

inline Vec load(const float* p) {
  Vec a;
  __builtin_memcpy(&a, p, sizeof a);
  return a;
}
inline void store(float* p, Vec a) { __builtin_memcpy(p, &a, sizeof a); }
inline Vec load_first(const float* p, int n) {
  Vec a = zero();
  for (int i = 0; i < n; ++i) a[i] = p[i];
  return a;
}
inline void store_first(float* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a[i];
}
inline Vec first_or(Vec a, int n, Vec other) { return IntVec{0, 1, 2, 3} < n ? a : other; }
inline Vec where_positive(Vec x, Vec a, Vec other) { return x > 0.0f ? a : other; }

inline float widen(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
// Round to nearest even by integer addition; a NaN keeps its upper bits, made quiet, instead of becoming
// infinity.
inline bf16 narrow(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits = x != x ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
  return {static_cast<uint16_t>(bits >> 16)};
}
inline Vec load(const bf16* p) { return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}; }
inline Vec load_first(const bf16* p, int n) {
  Vec a = zero();
  for (int i = 0; i < n; ++i) a[i] = widen(p[i]);
  return a;
}
inline void store_first(bf16* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = narrow(a[i]);
}
inline void store(bf16* p, Vec a) { store_first(p, a, kLanes); }

constexpr bool kHasPairs = true;
typedef uint32_t PairVec __attribute__((vector_size(16)));
inline PairVec load_pairs(const bf16* p) {
  PairVec a;
  __builtin_memcpy(&a, p, sizeof a);
  return a;
}
inline PairVec set1_pair(const bf16* p) {
  uint32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return PairVec{pair, pair, pair, pair};
}
// The upper halves of the lanes as floats; the first of a pair is the lower half of a little-endian word.
inline Vec upper_halves(PairVec a) {
  const PairVec bits = a & 0xffff0000u;
  Vec value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline Vec fma_pairs(PairVec a, PairVec b, Vec c) {
  return fma(upper_halves(a), upper_halves(b), fma(upper_halves(a << 16), upper_halves(b << 16), c));
}

inline void transpose(Vec r[kLanes]) {
  const Vec a = r[0], b = r[1], c = r[2], d = r[3];
  for (int i = 0; i < 4; ++i) r[i] = Vec{a[i], b[i], c[i], d[i]};
}

}  // namespace transkimmer::cpu::TRANSKIMMER_ISA
