// 8 floats in a 256-bit register. One of three files with the same interface; see vec_generic.h for the
// meaning.
#pragma once

#include <immintrin.h>

#include "bf16.h"

namespace transkimmer::cpu::TRANSKIMMER_ISA {

using Vec = __m256;
constexpr int kLanes = 8;
// 6 x 2 accumulators + 2 columns + 1 broadcast = 15 of 16 registers.
constexpr int kTileRows = 6;
constexpr int kTileVecs = 2;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec copy_sign(Vec a, Vec sign) {
  return _mm256_or_ps(abs(a), _mm256_and_ps(_mm256_set1_ps(-0.0f), sign));
}

// Below 2^-126 the result is 0, not a denormal: the two factors would cost more than those bits are worth.
inline Vec scale_by_power_of_two(Vec a, Vec n) {
  const Vec bounded = _mm256_min_ps(_mm256_max_ps(n, _mm256_set1_ps(-127.0f)), _mm256_set1_ps(128.0f));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(bounded), _mm256_set1_epi32(127));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
inline float sum_lanes(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float max_lanes(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load_first(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
inline void store_first(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a); }
inline Vec first_or(Vec a, int n, Vec other) {
  return _mm256_blendv_ps(other, a, _mm256_castsi256_ps(first_lanes(n)));
}
inline Vec where_positive(Vec x, Vec a, Vec other) {
  return _mm256_blendv_ps(other, a, _mm256_cmp_ps(x, zero(), _CMP_GT_OQ));
}

inline Vec widen(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
// Round to nearest even by integer addition; a NaN keeps its upper bits, made quiet, instead of becoming
// infinity.
inline __m128i narrow(Vec a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}
inline Vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(bf16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
inline Vec load_first(const bf16* p, int n) {
  alignas(16) bf16 whole[kLanes] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}
inline void store_first(bf16* p, Vec a, int n) {
  alignas(16) bf16 whole[kLanes];
  store(whole, a);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

// Twelve sums leave no registers to take pairs apart in.
constexpr bool kHasPairs = false;

// 8 x 8, in three rounds that interleave elements at distance 1, 2 and 4.
inline void transpose(Vec r[kLanes]) {
  Vec t[kLanes];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    const Vec low = r[j], high = r[j + 4];
    r[j] = _mm256_permute2f128_ps(low, high, 0x20);
    r[j + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

}  // namespace transkimmer::cpu::TRANSKIMMER_ISA
