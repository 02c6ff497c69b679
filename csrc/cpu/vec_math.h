// Transcendental functions on vectors, in fp32. Coefficients are minimax fits made for this file (Lawson's
// weighted least squares in fp64); the errors named are those of the fp32 evaluation.
#pragma once

namespace transkimmer::cpu::TRANSKIMMER_ISA {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// The next vector of an array of which n elements are left: a whole one, or a partial one filled up with
// zeros.
template <typename T>
Vec load_part(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, static_cast<int>(n));
}

// 2^x within 2 ulp for x <= 128; 0 below -127 (exactly 0 at -infinity).
inline Vec exp2(Vec x) {
  // Keeps -infinity out of x - round(x), where it would make a NaN. x stands second because max returns its
  // second operand if either is a NaN, and a NaN must come through.
  x = max(set1(-160.0f), x);
  const Vec n = round(x);
  const Vec f = sub(x, n);
  Vec p = set1(1.53458119684065e-4f);
  p = fma(p, f, set1(1.339993161666127e-3f));
  p = fma(p, f, set1(9.618488960706007e-3f));
  p = fma(p, f, set1(5.550328775986632e-2f));
  p = fma(p, f, set1(2.4022646890568425e-1f));
  p = fma(p, f, set1(6.931472057377148e-1f));
  p = fma(p, f, set1(1.0f));
  return scale_by_power_of_two(p, n);
}

// erf(x) = x P(x^2) / Q(x^2) up to |x| = 3.92, beyond which erf is 1 to fp32; absolute error below 4e-7.
inline Vec erf(Vec x) {
  x = max(set1(-3.92f), min(set1(3.92f), x));
  const Vec u = mul(x, x);
  Vec p = set1(1.9921428788244954e-8f);
  p = fma(p, u, set1(-1.9943009974139787e-6f));
  p = fma(p, u, set1(1.4898698659146815e-4f));
  p = fma(p, u, set1(3.972897877400401e-3f));
  p = fma(p, u, set1(5.139728689633798e-2f));
  p = fma(p, u, set1(2.06114336546337e-1f));
  p = fma(p, u, set1(1.1283787774109815f));
  Vec q = set1(1.0241256940026796e-3f);
  q = fma(q, u, set1(1.4889225460750784e-2f));
  q = fma(q, u, set1(1.1756460034654793e-1f));
  q = fma(q, u, set1(5.159928399163503e-1f));
  q = fma(q, u, set1(1.0f));
  return div(mul(x, p), q);
}

inline Vec gelu(Vec x) {
  const Vec half = mul(x, set1(0.5f));
  return fma(half, erf(mul(x, set1(0.70710678118654752f))), half);
}

}  // namespace transkimmer::cpu::TRANSKIMMER_ISA
