// Steps through the CUDA kernels of short attention on the host (cuda_emulation/) and compares them with a
// plain loop; and checks the rule by which sequences share tiles.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/short_attention.cu"  // with cuda_emulation/ in the place of the CUDA headers

namespace {

using namespace transkimmer;
using Lengths = std::vector<int>;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

std::vector<int32_t> offsets(const Lengths& lengths) {
  std::vector<int32_t> sums{0};
  for (int length : lengths) sums.push_back(sums.back() + length);
  return sums;
}

// ---- The rule ----

// Every sequence is in exactly one tile, whole, and every tile fits.
void check_tiles(const Lengths& lengths, const std::string& what) {
  const auto cu = offsets(lengths);
  const int longest = lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  const auto batch = static_cast<int64_t>(lengths.size());
  int64_t next = 0;
  for (int64_t tile = 0; tile < attention_tiles(cu.back()); ++tile) {
    const TileSequences s = tile_sequences(cu.data(), batch, tile);
    if (s.first == s.last) continue;
    expect(s.first == next, what + ": tiles follow each other");
    expect(cu[s.last] - cu[s.first] < tile_keys(longest), what + ": a tile holds its keys");
    next = s.last;
  }
  expect(next == batch, what + ": every sequence has a tile");
  // The search of many threads finds what bisection finds.
  for (int64_t target : {0, 1, kTileStride, 3 * kTileStride, int{cu.back()}, cu.back() + 1}) {
    for (int64_t threads : {1, 4, 256}) {
      SearchStep step{0, batch};
      while (step.first < step.last) {
        int64_t below = 0;
        for (int64_t t = 0; t < threads; ++t) {
          const int64_t probe = step.probe(threads, t);
          below += probe < step.last && cu[probe] < target;
        }
        step = step.narrowed(threads, below);
      }
      expect(step.first == lower_bound(cu.data(), batch, target),
             what + ": search of " + std::to_string(threads));
    }
  }
}

void check_rule(std::mt19937& random) {
  check_tiles({}, "no sequences");
  check_tiles({0, 0, 0}, "no keys");
  check_tiles(Lengths(9, 64), "only long ones");
  check_tiles(Lengths(9, 128), "only the longest");
  check_tiles({64, 0, 0, 63, 1, 64, 0}, "ends on a tile's edge");
  for (int longest : {1, 2, 7, 30, 64, 128}) {
    for (int batch : {1, 5, 300}) {
      Lengths lengths;
      for (int b = 0; b < batch; ++b)
        lengths.push_back(std::uniform_int_distribution<int>(0, longest)(random));
      check_tiles(lengths, "up to " + std::to_string(longest) + " keys");
    }
  }
}

// ---- The kernel ----

struct Case {
  Lengths queries, keys;
  int heads, head_dim;
  bool weighted, importance;
  int spare = 3;
  float scale = 0.4f;
  int bound = -1;  // max_seqlen_k; -1: the length of the longest sequence
};

// Tensors [rows, heads, head_dim] as slices of a projection that is wider than the heads; NaN where nothing
// may be read.
template <class T>
struct Inputs {
  std::vector<int32_t> cu_q, cu_k;
  int64_t capacity_q, capacity_k, row_stride;
  std::vector<uint16_t> q, k, v;
  std::vector<float> keep;

  Inputs(const Case& c, std::mt19937& random) : cu_q(offsets(c.queries)), cu_k(offsets(c.keys)) {
    capacity_q = cu_q.back() + c.spare;
    capacity_k = cu_k.back() + c.spare;
    row_stride = c.heads * c.head_dim + 8;
    q = fill(capacity_q, cu_q.back(), c, random);
    k = fill(capacity_k, cu_k.back(), c, random);
    v = fill(capacity_k, cu_k.back(), c, random);
    for (int64_t j = 0; j < capacity_k; ++j) {
      const int eighths = std::uniform_int_distribution<int>(-4, 12)(random);
      keep.push_back(j < cu_k.back() ? static_cast<float>(std::clamp(eighths, 0, 8)) / 8 : kNaN);
    }
  }

  std::vector<uint16_t> fill(int64_t capacity, int64_t count, const Case& c, std::mt19937& random) const {
    std::normal_distribution<float> normal;
    std::vector<uint16_t> x(capacity * row_stride, T::round(kNaN));
    for (int64_t row = 0; row < count; ++row) {
      for (int i = 0; i < c.heads * c.head_dim; ++i) x[row * row_stride + i] = T::round(normal(random));
    }
    return x;
  }

  int64_t at(int64_t row, int head, int dim, const Case& c) const {
    return row * row_stride + head * c.head_dim + dim;
  }
};

struct Outputs {
  std::vector<float> out, lse, importance;
};

template <class T>
Outputs actual(const Case& c, const Inputs<T>& in) {
  const int64_t width = c.heads * c.head_dim;
  std::vector<uint16_t> out(in.capacity_q * width, T::round(kNaN));
  Outputs result{
      {}, std::vector<float>(c.heads * in.capacity_q, kNaN), std::vector<float>(in.capacity_k, kNaN)};
  std::vector<float> workspace(c.heads * in.capacity_k, kNaN);
  ShortAttentionArguments arguments{};
  arguments.q = {in.q.data(), in.row_stride, c.head_dim};
  arguments.k = {in.k.data(), in.row_stride, c.head_dim};
  arguments.v = {in.v.data(), in.row_stride, c.head_dim};
  arguments.cu_seqlens_q = in.cu_q.data();
  arguments.cu_seqlens_k = in.cu_k.data();
  arguments.keep = c.weighted ? in.keep.data() : nullptr;
  arguments.out = out.data();
  arguments.lse = result.lse.data();
  arguments.importance_by_head = c.importance ? workspace.data() : nullptr;
  arguments.importance = c.importance ? result.importance.data() : nullptr;
  arguments.capacity_q = in.capacity_q;
  arguments.capacity_k = in.capacity_k;
  arguments.batch = static_cast<int64_t>(c.keys.size());
  arguments.max_seqlen_k = c.bound;
  if (c.bound < 0 && !c.keys.empty())
    arguments.max_seqlen_k = *std::max_element(c.keys.begin(), c.keys.end());
  arguments.heads = c.heads;
  arguments.head_dim = c.head_dim;
  arguments.scale = c.scale;
  const Float16 format = std::is_same_v<T, Fp16> ? Float16::kFp16 : Float16::kBf16;
  expect(short_attention(arguments, format, nullptr) == cudaSuccess, "launch");
  for (uint16_t bits : out) result.out.push_back(T::widen(bits));
  return result;
}

template <class T>
Outputs expected(const Case& c, const Inputs<T>& in) {
  const int64_t width = c.heads * c.head_dim;
  Outputs result{std::vector<float>(in.capacity_q * width, kNaN),
                 std::vector<float>(c.heads * in.capacity_q, kNaN), std::vector<float>(in.capacity_k, kNaN)};
  if (c.importance) std::fill_n(result.importance.begin(), in.cu_k.back(), 0.0f);
  for (size_t b = 0; b < c.keys.size(); ++b) {
    for (int head = 0; head < c.heads; ++head) {
      for (int i = in.cu_q[b]; i < in.cu_q[b + 1]; ++i) {
        std::vector<double> p;
        double sum = 0;
        for (int j = in.cu_k[b]; j < in.cu_k[b + 1]; ++j) {
          double score = 0;
          for (int d = 0; d < c.head_dim; ++d) {
            score += double{T::widen(in.q[in.at(i, head, d, c)])} * T::widen(in.k[in.at(j, head, d, c)]);
          }
          p.push_back(std::exp(c.scale * score) * (c.weighted ? in.keep[j] : 1.0f));
          sum += p.back();
        }
        result.lse[head * in.capacity_q + i] = static_cast<float>(std::log(sum));
        for (int d = 0; d < c.head_dim; ++d) result.out[i * width + head * c.head_dim + d] = 0;
        for (int j = in.cu_k[b]; j < in.cu_k[b + 1]; ++j) {
          const double share = sum == 0 ? 0 : p[j - in.cu_k[b]] / sum;
          if (c.importance) result.importance[j] += static_cast<float>(share);
          for (int d = 0; d < c.head_dim; ++d) {
            result.out[i * width + head * c.head_dim + d] +=
                static_cast<float>(share * T::widen(in.v[in.at(j, head, d, c)]));
          }
        }
      }
    }
  }
  return result;
}

// Both NaN, both the same infinity, or both within a tolerance of each other.
bool close(const std::vector<float>& a, const std::vector<float>& b, float tolerance) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) != std::isnan(b[i])) return false;
    if (!std::isnan(a[i]) && a[i] != b[i] && !(std::fabs(a[i] - b[i]) <= tolerance * (1 + std::fabs(b[i]))))
      return false;
  }
  return true;
}

template <class T>
void compare(const Case& c, const Inputs<T>& in, const std::string& what) {
  const Outputs ours = actual(c, in), plain = expected(c, in);
  const float unit = std::is_same_v<T, Fp16> ? 1.0f / 1024 : 1.0f / 128;
  expect(close(ours.out, plain.out, 2 * unit), what + ": out");
  expect(close(ours.lse, plain.lse, 2e-5f), what + ": lse");
  expect(close(ours.importance, plain.importance, 5e-5f), what + ": importance");
}

template <class T>
void check_shapes(std::mt19937& random) {
  const std::vector<std::pair<std::string, Case>> cases{
      {"empty batch", {{}, {}, 2, 32, false, true}},
      {"empty sequences", {{0, 0, 0}, {0, 0, 0}, 1, 32, true, true}},
      {"one token", {{1}, {1}, 1, 64, false, true, 0}},
      {"tiny", {{1, 0, 2, 1, 3, 0}, {1, 0, 2, 1, 3, 0}, 2, 32, true, true}},
      {"up to the limit", {{17, 63, 0, 64, 1, 64, 40}, {17, 63, 0, 64, 1, 64, 40}, 2, 64, false, true}},
      {"the middle kind", {{96, 30, 0, 65, 1}, {96, 30, 0, 65, 1}, 1, 64, true, true}},
      {"the longer kind", {{17, 128, 0, 65, 1, 127, 40}, {17, 128, 0, 65, 1, 127, 40}, 1, 64, true, true}},
      {"a tile and one more", {{40, 24, 1, 30, 33}, {40, 24, 1, 30, 33}, 1, 32, true, false}},
      {"first tokens as queries", {{1, 0, 1, 1, 1}, {40, 0, 64, 1, 23}, 2, 64, false, true}},
      {"queries without a key", {{3, 2, 40, 5, 90}, {5, 0, 0, 1, 0}, 1, 32, false, true}},
      {"keys without a query", {{0, 2, 0, 1}, {9, 3, 64, 7}, 1, 32, true, true}},
      {"steep", {{20, 30}, {20, 30}, 1, 64, false, true, 0, 3.0f}},
  };
  for (const auto& [name, c] : cases) compare(c, Inputs<T>(c, random), name);

  Case many{{}, {}, 1, 32, true, true};
  for (int b = 0; b < 90; ++b) many.queries.push_back(1 + 7 * b % 5);
  many.keys = many.queries;
  compare(many, Inputs<T>(many, random), "many short");

  many.importance = false;
  for (int b = 90; b < 900; ++b) many.queries.push_back(b % 3 == 0);  // more than 4 to a thread
  many.keys = many.queries;
  compare(many, Inputs<T>(many, random), "very many");

  const Case none{{3, 20, 2}, {3, 20, 2}, 2, 32, true, true};
  Inputs<T> in(none, random);
  std::fill_n(in.keep.begin() + 3, 20, 0.0f);
  compare(none, in, "no kept key");
}

// NaN and infinity in one sequence reach all of it, and not a bit of the sequences beside it.
template <class T>
void check_isolation(std::mt19937& random) {
  const Case c{{9, 20, 7}, {9, 20, 7}, 2, 32, false, true};
  const Inputs<T> clean(c, random);
  const Outputs before = actual(c, clean);
  for (const char* which : {"q", "k", "v"}) {
    for (float poison : {kNaN, std::numeric_limits<float>::infinity()}) {
      Inputs<T> in = clean;
      auto& x = *which == 'q' ? in.q : *which == 'k' ? in.k : in.v;
      for (int d = 0; d < c.head_dim; ++d) x[in.at(15, 1, d, c)] = T::round(poison);
      const Outputs after = actual(c, in);
      bool same = true, shows = true;
      for (int64_t i = 0; i < 36; ++i) {
        const bool own = i >= 9 && i < 29, hit = own && (*which != 'q' || i == 15);
        for (int64_t d = 0; d < 64; ++d) {
          const float a = before.out[i * 64 + d], b = after.out[i * 64 + d];
          // Which elements an infinite key spoils depends on signs: there, only that the others stay is
          // checked.
          if (!own || d < 32) same = same && std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b);
          if (hit && d >= 32 && (std::isnan(poison) || *which == 'v')) shows = shows && !std::isfinite(b);
        }
        if (!own) same = same && before.importance[i] == after.importance[i];
        if (!own) same = same && before.lse[in.capacity_q + i] == after.lse[in.capacity_q + i];
      }
      expect(same, std::string("a foreign value in ") + which + " is seen");
      expect(shows, std::string("an own value in ") + which + " is hidden");
      if (*which == 'v') compare(c, in, "poisoned v");
    }
  }
}

// A sequence that is longer than the bound loses keys, and costs the others nothing.
template <class T>
void check_low_bound(std::mt19937& random) {
  for (int head_dim : {32, 64}) {
    for (int bound : {10, 80, 128}) {
      const Lengths lengths{9, 20, 230, 7, 33};
      const Case c{lengths, lengths, 2, head_dim, true, true, 3, 0.4f, bound};
      Inputs<T> in(c, random);
      in.v[in.at(29 + 200, 1, 3, c)] = T::round(kNaN);  // a key behind those that fit
      const Outputs ours = actual(c, in), plain = expected(c, in);
      const float unit = std::is_same_v<T, Fp16> ? 1.0f / 1024 : 1.0f / 128;
      const auto within = [](const std::vector<float>& x, int64_t begin, int64_t end) {
        return std::vector<float>(x.begin() + begin, x.begin() + end);
      };
      const int64_t width = c.heads * head_dim, rows = in.capacity_q;
      const std::string what = "bound " + std::to_string(bound) + ", head_dim " + std::to_string(head_dim);
      for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 29}, {259, in.cu_q.back()}}) {
        expect(close(within(ours.out, begin * width, end * width),
                     within(plain.out, begin * width, end * width), 2 * unit),
               what + ": out of the others");
        expect(close(within(ours.lse, rows + begin, rows + end), within(plain.lse, rows + begin, rows + end),
                     2e-5f),
               what + ": lse of the others");
        expect(close(within(ours.importance, begin, end), within(plain.importance, begin, end), 5e-5f),
               what + ": importance of the others");
      }
      const auto own = within(ours.out, 29 * width, 259 * width);
      expect(std::all_of(own.begin(), own.end(), [](float x) { return std::isfinite(x); }),
             what + ": out of the long one");
    }
  }
}

void check_formats() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float x = Fp16::widen(half), y = Bf16::widen(half);
    if (!std::isnan(x))
      expect(Fp16::round(x) == half && static_cast<float>(static_cast<_Float16>(x)) == x, "fp16");
    if (!std::isnan(y)) expect(Bf16::round(y) == half, "bf16");
  }
}

}  // namespace

int main() {
  std::mt19937 random(7);
  check_formats();
  check_rule(random);
  check_shapes<Fp16>(random);
  check_shapes<Bf16>(random);
  check_isolation<Fp16>(random);
  check_isolation<Bf16>(random);
  check_low_bound<Fp16>(random);
  check_low_bound<Bf16>(random);
  if (failures == 0) std::printf("short attention: the kernels agree with the plain loop\n");
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
