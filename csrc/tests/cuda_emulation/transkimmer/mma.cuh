// Stands in for csrc/include/transkimmer/mma.cuh, whose comments describe what these functions do.
#pragma once

#include <cuda_runtime.h>

#include <array>

namespace transkimmer {

struct Fp16 {
  static constexpr uint32_t kExponent = 0x7c00, kLowestExponentBit = 0x0400;
  static float widen(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                      : std::ldexp(static_cast<float>(fraction), -24);
    return bits & 0x8000 ? -size : size;
  }
  static uint16_t round(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return 0x7fff;
    const float size = std::fabs(x);
    if (size >= 65520.0f) return sign | 0x7c00;
    // A unit in the last place is 2^(exponent - 10), with the smallest exponent -14 for denormals.
    const int exponent = std::max(size > 0 ? std::ilogb(size) : -14, -14);
    const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + units));
  }
};

struct Bf16 {
  static constexpr uint32_t kExponent = 0x7f80, kLowestExponentBit = 0x0080;
  static float widen(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
  static uint16_t round(float x) {
    if (std::isnan(x)) return 0x7fff;
    const auto bits = std::bit_cast<uint32_t>(x);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

template <class T>
float2 unpack(uint32_t pair) {
  return {T::widen(static_cast<uint16_t>(pair)), T::widen(static_cast<uint16_t>(pair >> 16))};
}
template <class T>
uint32_t pack(float low, float high) {
  return T::round(low) | uint32_t{T::round(high)} << 16;
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
    float d[4];
  };
  const auto multiply = [](const auto& lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<T>(lanes[lane]->a[i]);
        a[row + i % 2 * 8][column + i / 2 * 8] = pair.x;
        a[row + i % 2 * 8][column + i / 2 * 8 + 1] = pair.y;
      }
      for (int i = 0; i < 2; ++i) {
        const float2 pair = unpack<T>(lanes[lane]->b[i]);
        b[column + i * 8][row] = pair.x;
        b[column + i * 8 + 1][row] = pair.y;
      }
    }
    std::array<std::array<float, 8>, 16> sums{};
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) {
        for (int j = 0; j < 8; ++j) sums[i][j] += a[i][k] * b[k][j];
      }
    }
    return [sums, &lanes](int lane) {
      std::array<float, 4> result;
      for (int i = 0; i < 4; ++i) {
        result[i] = lanes[lane]->d[i] + sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
      }
      return result;
    };
  };
  const auto result = emulation::warp_collective(
      Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}}, multiply);
  for (int i = 0; i < 4; ++i) d[i] = result[i];
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed = false) {
  const auto result = emulation::warp_collective(row, [transposed](const auto& rows) {
    return [&rows, transposed](int lane) {
      std::array<uint32_t, 4> words;
      for (int m = 0; m < 4; ++m) {
        const auto element = [&](int i, int j) {
          return uint32_t{static_cast<const uint16_t*>(*rows[8 * m + i])[j]};
        };
        const int i = lane / 4, j = lane % 4 * 2;
        words[m] =
            transposed ? element(j, i) | element(j + 1, i) << 16 : element(i, j) | element(i, j + 1) << 16;
      }
      return words;
    };
  });
  for (int m = 0; m < 4; ++m) r[m] = result[m];
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { load_matrices(r, row, true); }

}  // namespace transkimmer

#define TRANSKIMMER_DYNAMIC_SHARED(name) unsigned char* const name = emulation::dynamic_shared()
