// Steps through the CUDA kernel of the skim predictor on the host (cuda_emulation/) and compares it with a
// plain loop.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/skim_logit.cu"  // with cuda_emulation/ in the place of the CUDA headers

namespace {

using namespace transkimmer;
using Bits = std::vector<uint16_t>;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

// A predictor and states of which `count` rows are listed; all others are NaN.
template <class T>
struct Case {
  int width, inner, count, capacity;
  std::vector<int32_t> slots, cu_seqlens;
  Bits hidden, norm1_weight, norm1_bias, fc_weight, fc_bias, norm2_weight, norm2_bias, out_weight, out_bias;

  Case(std::mt19937& random, int width, int inner, int count, int spare)
      : width(width), inner(inner), count(count), capacity(count + spare), cu_seqlens{0, count / 3, count} {
    const int rows = count + 4;
    slots.resize(rows);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), random);
    slots.resize(count);
    hidden.assign(rows * width, T::round(kNaN));
    const Bits states = normal(random, count * width, 2.0f, 0.7f);
    for (int i = 0; i < count; ++i) std::copy_n(&states[i * width], width, &hidden[slots[i] * width]);
    slots.resize(capacity, 2000000000);
    norm1_weight = normal(random, width, 0.2f, 1.0f);
    norm1_bias = normal(random, width, 0.2f, 0.0f);
    fc_weight = normal(random, inner * width, 1 / std::sqrt(static_cast<float>(width)), 0.0f);
    fc_bias = normal(random, inner, 0.2f, 0.0f);
    norm2_weight = normal(random, inner, 0.2f, 1.0f);
    norm2_bias = normal(random, inner, 0.2f, 0.0f);
    out_weight = normal(random, inner, 1 / std::sqrt(static_cast<float>(inner)), 0.0f);
    out_bias = normal(random, 1, 1.0f, 0.5f);
  }

  static Bits normal(std::mt19937& random, int size, float scale, float shift) {
    std::normal_distribution<float> distribution(shift, scale);
    Bits x(size);
    for (auto& bits : x) bits = T::round(distribution(random));
    return x;
  }

  cudaError_t run(float* logit, uint8_t* keep, float threshold) const {
    SkimLogitArguments a{};
    a.hidden = hidden.data();
    a.slots = slots.data();
    a.cu_seqlens = cu_seqlens.data();
    a.norm1_weight = norm1_weight.data();
    a.norm1_bias = norm1_bias.data();
    a.fc_weight = fc_weight.data();
    a.fc_bias = fc_bias.data();
    a.norm2_weight = norm2_weight.data();
    a.norm2_bias = norm2_bias.data();
    a.out_weight = out_weight.data();
    a.out_bias = out_bias.data();
    a.logit = logit;
    a.keep = keep;
    a.capacity = capacity;
    a.batch = 2;
    a.width = width;
    a.inner = inner;
    a.eps = 1e-5f;
    a.threshold = threshold;
    return skim_logit(a, std::is_same_v<T, Fp16> ? Float16::kFp16 : Float16::kBf16, nullptr);
  }
};

template <class T>
std::vector<double> layer_norm(const std::vector<double>& x, const Bits& weight, const Bits& bias) {
  const auto n = static_cast<double>(x.size());
  const double mean = std::accumulate(x.begin(), x.end(), 0.0) / n;
  double squares = 0;
  for (double value : x) squares += (value - mean) * (value - mean);
  std::vector<double> y;
  for (size_t i = 0; i < x.size(); ++i) {
    y.push_back((x[i] - mean) / std::sqrt(squares / n + 1e-5) * T::widen(weight[i]) + T::widen(bias[i]));
  }
  return y;
}

template <class T>
float plain_logit(const Case<T>& c, int i) {
  std::vector<double> x, inner;
  for (int d = 0; d < c.width; ++d) x.push_back(T::widen(c.hidden[c.slots[i] * c.width + d]));
  x = layer_norm<T>(x, c.norm1_weight, c.norm1_bias);
  for (double& value : x) value = T::widen(T::round(static_cast<float>(value)));  // an operand of the product
  for (int n = 0; n < c.inner; ++n) {
    double sum = T::widen(c.fc_bias[n]);
    for (int d = 0; d < c.width; ++d) sum += x[d] * T::widen(c.fc_weight[n * c.width + d]);
    inner.push_back(sum);
  }
  inner = layer_norm<T>(inner, c.norm2_weight, c.norm2_bias);
  double logit = T::widen(c.out_bias[0]);
  for (int n = 0; n < c.inner; ++n) {
    logit += inner[n] * (0.5 + 0.5 * std::erf(inner[n] / std::sqrt(2.0))) * T::widen(c.out_weight[n]);
  }
  return static_cast<float>(logit);
}

// `broken`: a listed row that is NaN, or -1.
template <class T>
void check(std::mt19937& random, int width, int inner, int count, int spare, int broken = -1) {
  Case<T> c(random, width, inner, count, spare);
  if (broken >= 0) c.hidden[c.slots[broken] * width + 5] = T::round(kNaN);
  const std::string what = std::to_string(width) + " -> " + std::to_string(inner) + ", " +
                           std::to_string(count) + (std::is_same_v<T, Fp16> ? " rows, fp16" : " rows, bf16");
  std::vector<float> logit(c.capacity, -7.0f);
  expect(c.run(logit.data(), nullptr, 0.0f) == cudaSuccess, what + ": launch");
  for (int i = 0; i < c.capacity; ++i) {
    if (i >= count) {
      expect(logit[i] == -7.0f, what + ": a row beyond the count is written");
    } else if (i == broken) {
      expect(std::isnan(logit[i]), what + ": a broken row is hidden");
    } else {
      // Rounding of an operand may fall the other way where two ways to normalise differ by a unit of fp32.
      expect(std::fabs(logit[i] - plain_logit(c, i)) < (std::is_same_v<T, Fp16> ? 2e-4f : 1e-3f),
             what + ": logit");
    }
  }
  if (count == 0) return;
  // Decisions are those of the very logits, at a threshold that one of them is equal to.
  const float threshold = logit[count / 2];
  std::vector<uint8_t> keep(c.capacity, 9);
  c.run(nullptr, keep.data(), threshold);
  for (int i = 0; i < c.capacity; ++i) {
    expect(keep[i] == (i >= count ? 9 : !(logit[i] < threshold)), what + ": decision");
  }
}

template <class T>
void check_format(std::mt19937& random) {
  check<T>(random, 64, 192, 0, 5);
  check<T>(random, 64, 192, 1, 0);
  check<T>(random, 128, 192, 31, 40);
  check<T>(random, 384, 192, 33, 0, 32);
  check<T>(random, 64, 192, 70, 3, 0);
  check<T>(random, 768, 192, 5, 1, 2);
  check<T>(random, 1024, 192, 32, 1);
}

static_assert(skim_logit_fits(384, 192) && !skim_logit_fits(768, 768) && !skim_logit_fits(64, 32));
static_assert(!skim_logit_fits(0, 192) && !skim_logit_fits(96, 192) && !skim_logit_fits(1088, 192));

}  // namespace

int main() {
  std::mt19937 random(7);
  check_format<Fp16>(random);
  check_format<Bf16>(random);
  Case<Fp16> odd(random, 96, 192, 1, 0);
  expect(odd.run(nullptr, nullptr, 0.0f) == cudaErrorInvalidValue, "a width that does not fit is refused");
  if (failures == 0) std::printf("skim logit: the kernel agrees with the plain loop\n");
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
