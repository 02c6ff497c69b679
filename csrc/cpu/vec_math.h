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

// x (1/2 + erf(x / sqrt(2)) / 2), where half the erf is |x| P(x^2) / Q(x^2) with the sign of x; its absolute
// error is below 3e-7. From |x| = 5.546 on, where erf is 1 to fp32, that of 5.546 stands for it: it comes out
// as 1/2 exactly, by fused multiply-adds or not, so that far below zero GELU is zero.
inline Vec gelu(Vec x) {
  const Vec y = min(set1(5.546103f), abs(x));
  const Vec u = mul(y, y);
  Vec p = set1(1.1005138583666339e-10f);
  p = fma(p, u, set1(-2.203412123435187e-8f));
  p = fma(p, u, set1(3.2921783914805113e-6f));
  p = fma(p, u, set1(1.7557893937946654e-4f));
  p = fma(p, u, set1(4.542921262373884e-3f));
  p = fma(p, u, set1(3.6436211267920286e-2f));
  p = fma(p, u, set1(3.9894214262714545e-1f));
  Vec q = set1(6.400785587516748e-5f);
  q = fma(q, u, set1(1.861153182593848e-3f));
  q = fma(q, u, set1(2.9391150086636984e-2f));
  q = fma(q, u, set1(2.579964199581751e-1f));
  q = fma(q, u, set1(1.0f));
  return mul(x, add(set1(0.5f), copy_sign(div(mul(y, p), q), x)));
}

}  // namespace transkimmer::cpu::TRANSKIMMER_ISA
