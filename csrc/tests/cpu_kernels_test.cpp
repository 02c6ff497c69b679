// Self-check of the CPU kernels without torch: the instruction set that TRANSKIMMER_CPU_ISA names (or the
// best one of this machine) against double precision. Exit status 77 says that this machine lacks it, by
// what Linux lists: where it is listed and yet not found, the choice of an instruction set is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "transkimmer/cpu_kernels.h"
#include "transkimmer/cpu_schedule.h"

namespace cpu = transkimmer::cpu;

namespace {

// Not assert(): it would be compiled out of a release build.
#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

void check_close(double value, double expected, double tolerance, const char* what, int64_t index) {
  const bool equal = value == expected;  // infinities
  CHECK(equal || std::abs(value - expected) <= tolerance * (1 + std::abs(expected)),
        "%s[%lld] is %.9g, expected %.9g", what, static_cast<long long>(index), value, expected);
}

std::vector<float> random_floats(int64_t n, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& x : values) x = normal(engine);
  return values;
}

// Numbers of the type under test, fp32 or bf16, as plain bits, and back in floats.
template <typename Bits>
constexpr int kDType = sizeof(Bits) == 4 ? 0 : 1;

template <typename Bits>
std::vector<Bits> to_bits(const std::vector<float>& values) {
  std::vector<Bits> bits(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t word;
    std::memcpy(&word, &values[i], sizeof word);
    bits[i] = static_cast<Bits>(sizeof(Bits) == 4 ? word : word >> 16);  // bf16: towards zero
  }
  return bits;
}

template <typename Bits>
float to_float(Bits bits) {
  const uint32_t word = sizeof(Bits) == 4 ? bits : static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

struct Scratch {
  explicit Scratch(int64_t floats)
      : data(static_cast<float*>(std::aligned_alloc(64, (floats / 16 + 1) * 64))) {}
  ~Scratch() { std::free(data); }
  float* data;
};

// One ragged batch in a fused [rows, 3, heads, dim] projection, forward and backward, against the definition.
template <typename Bits>
void check_attention(const std::vector<int32_t>& lengths, int64_t heads, int64_t dim, bool weighted) {
  std::vector<int32_t> cu{0};
  for (int32_t n : lengths) cu.push_back(cu.back() + n);
  const int64_t rows = cu.back(), width = heads * dim;
  const auto qkv = to_bits<Bits>(random_floats(rows * 3 * width, 1)),
             grad = to_bits<Bits>(random_floats(rows * width, 2));
  std::vector<float> keep = random_floats(rows, 3);
  for (float& x : keep) x = std::max(x, 0.0f);
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  // Of results, and of the output that the backward pass takes for the sum of its weights.
  const double rounding = sizeof(Bits) == 4 ? 0 : 1.0 / 64;
  const cpu::AttentionShape shape{
      static_cast<int64_t>(lengths.size()), heads, dim, rows, rows, cu.data(), cu.data(), scale};
  const cpu::HeadView q{qkv.data(), 3 * width, dim}, k{qkv.data() + width, 3 * width, dim},
      v{qkv.data() + 2 * width, 3 * width, dim}, grad_out{grad.data(), width, dim};
  std::vector<Bits> out(rows * width), gq(rows * width), gk(rows * width), gv(rows * width);
  std::vector<float> lse(heads * rows), importance(heads * rows), gkeep(heads * rows);
  const float* weights = weighted ? keep.data() : nullptr;

  const cpu::Kernels& kernels = cpu::kernels();
  const cpu::AttentionPlan plan = cpu::plan_attention(shape, 3, false);
  const Scratch scratch(
      std::max(kernels.attention_forward_scratch(shape, plan.max_queries, plan.max_keys, true),
               kernels.attention_backward_scratch(shape, plan.max_keys)));
  const cpu::AttentionForwardArgs forward{shape, q, k, v, weights, out.data(), lse.data(), importance.data()};
  const cpu::AttentionBackwardArgs backward{
      shape,      grad_out, q,         k,         v,         {out.data(), width, dim},
      lse.data(), weights,  gq.data(), gk.data(), gv.data(), gkeep.data()};
  for (const auto& piece : plan.pieces) kernels.attention_forward[kDType<Bits>](forward, piece, scratch.data);
  for (const auto& piece : plan.pieces)
    kernels.attention_backward[kDType<Bits>](backward, piece, scratch.data);

  for (size_t b = 0; b < lengths.size(); ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      const auto at = [&](int64_t row, int part, int64_t d) {
        return double{to_float(qkv[(row * 3 + part) * width + h * dim + d])};
      };
      std::vector<double> dk(lengths[b] * dim), dv(lengths[b] * dim), dkeep(lengths[b]), received(lengths[b]);
      for (int64_t i = cu[b]; i < cu[b + 1]; ++i) {
        std::vector<double> e(lengths[b]), p(lengths[b]), o(dim), dq(dim);
        double sum = 0, delta = 0;
        for (int64_t j = 0; j < lengths[b]; ++j) {
          double s = 0;
          for (int64_t d = 0; d < dim; ++d) s += at(i, 0, d) * at(cu[b] + j, 1, d);
          e[j] = std::exp(s * scale);
          p[j] = e[j] * (weighted ? keep[cu[b] + j] : 1.0);
          sum += p[j];
        }
        check_close(lse[h * rows + i], std::log(sum), 1e-5, "lse", i);
        const double inverse = sum > 0 ? 1 / sum : 0;
        for (int64_t j = 0; j < lengths[b]; ++j) {
          e[j] *= inverse;
          received[j] += p[j] *= inverse;
          for (int64_t d = 0; d < dim; ++d) o[d] += p[j] * at(cu[b] + j, 2, d);
        }
        const Bits* g = &grad[i * width + h * dim];
        for (int64_t d = 0; d < dim; ++d) {
          check_close(to_float(out[i * width + h * dim + d]), o[d], 1e-5 + rounding, "out", i);
          delta += to_float(g[d]) * o[d];
        }
        for (int64_t j = 0; j < lengths[b]; ++j) {
          double dp = -delta;
          for (int64_t d = 0; d < dim; ++d) dp += to_float(g[d]) * at(cu[b] + j, 2, d);
          dkeep[j] += e[j] * dp;
          for (int64_t d = 0; d < dim; ++d) {
            dq[d] += scale * p[j] * dp * at(cu[b] + j, 1, d);
            dk[j * dim + d] += scale * p[j] * dp * at(i, 0, d);
            dv[j * dim + d] += p[j] * to_float(g[d]);
          }
        }
        for (int64_t d = 0; d < dim; ++d)
          check_close(to_float(gq[i * width + h * dim + d]), dq[d], 1e-4 + rounding, "grad_q", i);
      }
      for (int64_t j = 0; j < lengths[b]; ++j) {
        const int64_t row = cu[b] + j;
        check_close(importance[h * rows + row], received[j], 1e-4, "importance", row);
        if (weighted) check_close(gkeep[h * rows + row], dkeep[j], 1e-3 + rounding, "grad_keep", row);
        for (int64_t d = 0; d < dim; ++d) {
          check_close(to_float(gk[row * width + h * dim + d]), dk[j * dim + d], 1e-4 + rounding, "grad_k",
                      row);
          check_close(to_float(gv[row * width + h * dim + d]), dv[j * dim + d], 1e-4 + rounding, "grad_v",
                      row);
        }
      }
    }
  }
}

template <typename Bits>
void check_attentions(bool weighted) {
  check_attention<Bits>({1, 0, 2, 17, 33}, 2, 64, weighted);
  check_attention<Bits>({5, 70}, 3, 40, weighted);
  check_attention<Bits>({3, 1, 40}, 2, 33, weighted);
  check_attention<Bits>({9, 20}, 2, 5, weighted);
  check_attention<Bits>({600}, 1, 32, weighted);
}

// Every query of every head in exactly one piece, however many threads there are.
void check_plan() {
  const std::vector<int32_t> cu{0, 700, 700, 703, 760};
  for (int64_t threads : {1, 2, 7, 64}) {
    const cpu::AttentionShape shape{4, 5, 64, 760, 760, cu.data(), cu.data(), 1.0f};
    std::vector<int> seen(5 * 760);
    for (const auto& p : cpu::plan_attention(shape, threads, true).pieces) {
      for (int64_t h = p.head_begin; h < p.head_end; ++h) {
        for (int64_t i = p.query_begin; i < p.query_end; ++i) ++seen[h * 760 + cu[p.sequence] + i];
      }
    }
    CHECK(std::count(seen.begin(), seen.end(), 1) == 5 * 760, "with %d threads", static_cast<int>(threads));
  }
}

template <typename Bits>
void check_norm(int64_t dim) {
  const auto x = to_bits<Bits>(random_floats(dim, 4)), r = to_bits<Bits>(random_floats(dim, 5)),
             w = to_bits<Bits>(random_floats(dim, 6)), b = to_bits<Bits>(random_floats(dim, 7)),
             u = to_bits<Bits>(random_floats(dim, 8));
  std::vector<double> sum(dim), z(dim);
  double mean = 0, variance = 0, delta = 0.25;
  for (int64_t d = 0; d < dim; ++d) sum[d] = double{to_float(x[d])} + to_float(r[d]);
  for (int64_t d = 0; d < dim; ++d) mean += sum[d] / dim;
  for (int64_t d = 0; d < dim; ++d) variance += std::pow(sum[d] - mean, 2) / dim;
  std::vector<Bits> out = r;  // the output is the residual itself
  for (int64_t d = 0; d < dim; ++d) {
    z[d] = (sum[d] - mean) / std::sqrt(variance + 1e-5) * to_float(w[d]) + to_float(b[d]);
    delta += to_float(u[d]) * 0.5 * z[d] * (1 + std::erf(z[d] / std::sqrt(2.0)));
  }
  const double tolerance = 1e-5 + (sizeof(Bits) == 4 ? 0 : 1.0 / 128);
  const cpu::Kernels& kernels = cpu::kernels();
  const Scratch scratch(kernels.norm_scratch(dim));
  cpu::NormArgs args{};
  args.dim = dim, args.eps = 1e-5f, args.weight = w.data(), args.bias = b.data();
  args.x = x.data(), args.residual = args.out = out.data();
  kernels.norm_rows[kDType<Bits>](args, 0, 1, scratch.data);
  for (int64_t d = 0; d < dim; ++d) check_close(to_float(out[d]), z[d], tolerance, "norm", d);
  // The same sum, of three rows: half of x twice, as the third row of a table, and what it was added to.
  std::vector<float> halves(3 * dim);
  for (int64_t d = 0; d < dim; ++d) halves[2 * dim + d] = to_float(x[d]) / 2;
  const auto table = to_bits<Bits>(halves);
  const int32_t third = 2;
  args.x = table.data() + 2 * dim, args.residual = r.data();
  args.addend = table.data(), args.addend_index = &third;
  kernels.norm_rows[kDType<Bits>](args, 0, 1, scratch.data);
  for (int64_t d = 0; d < dim; ++d) check_close(to_float(out[d]), z[d], tolerance, "norm of three", d);
  // The predictor's end, on a row that is whole already: the sum of two is not a number of 16 bits.
  const auto whole = to_bits<Bits>(std::vector<float>(sum.begin(), sum.end()));
  args.x = whole.data(), args.residual = nullptr;
  float result = 0;
  kernels.norm_gelu_dot[kDType<Bits>]({args, u.data(), 0.25f, &result}, 0, 1, scratch.data);
  check_close(result, delta, tolerance * std::sqrt(static_cast<double>(dim)), "delta", 0);
}

template <typename Bits>
struct Panels {
  Panels(const std::vector<Bits>& weight, int64_t out, int64_t in)
      : memory(cpu::kernels().product_panels(out) * cpu::kernels().product_columns * in) {
    const cpu::Kernels& k = cpu::kernels();
    k.pack_panels[kDType<Bits>](weight.data(), out, in, 0, k.product_panels(out), memory.data);
  }
  Scratch memory;
};

// y [rows, out], by as many threads as there are panels.
template <typename Bits>
std::vector<Bits> multiply(const cpu::Kernels& k, cpu::ProductArgs args) {
  std::vector<Bits> y(args.rows * args.out + 1, 7);
  args.y = y.data();
  const Scratch scratch(k.product_scratch[kDType<Bits>](args));
  for (int64_t p = 0; p < k.product_panels(args.out); ++p) {
    k.product[kDType<Bits>](args, p, p + 1, scratch.data);
  }
  CHECK(y.back() == 7, "a product of %lld rows wrote behind its output", static_cast<long long>(args.rows));
  y.pop_back();
  return y;
}

template <typename Bits>
void check_product(int64_t rows, int64_t in, int64_t out, bool gelu) {
  const auto w = to_bits<Bits>(random_floats(out * in, 9)), bias = to_bits<Bits>(random_floats(out, 10));
  auto x = to_bits<Bits>(random_floats(rows * in, 11));
  const cpu::Kernels& k = cpu::kernels();
  const Panels<Bits> panels(w, out, in);
  const cpu::ProductArgs args{rows, in, out, x.data(), panels.memory.data, bias.data(), gelu, nullptr};
  const std::vector<Bits> y = multiply<Bits>(k, args);
  const double rounding = sizeof(Bits) == 4 ? 0 : 1.0 / 256;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t o = 0; o < out; ++o) {
      double z = to_float(bias[o]);
      for (int64_t d = 0; d < in; ++d) z += double{to_float(x[i * in + d])} * to_float(w[o * in + d]);
      if (gelu) z *= 0.5 * (1 + std::erf(z / std::sqrt(2.0)));
      check_close(to_float(y[i * out + o]), z, 1e-6 * std::sqrt(static_cast<double>(in)) + rounding,
                  "product", i * out + o);
    }
  }
  // The same bits in one piece, and for a row whatever stands in the others and however many they are.
  std::vector<Bits> whole(rows * out);
  cpu::ProductArgs piece = args;
  piece.y = whole.data();
  const Scratch scratch(k.product_scratch[kDType<Bits>](piece));
  k.product[kDType<Bits>](piece, 0, k.product_panels(out), scratch.data);
  CHECK(whole == y, "%lld rows", static_cast<long long>(rows));
  if (rows < 2) return;
  std::fill(x.begin(), x.begin() + in, to_bits<Bits>({std::nanf("")})[0]);
  const std::vector<Bits> spoilt = multiply<Bits>(k, args);
  CHECK(std::equal(y.begin() + out, y.end(), spoilt.begin() + out), "a NaN in row 0 is seen in others");
  CHECK(std::isnan(to_float(spoilt[0])), "a NaN got lost");
  piece = args;
  piece.x = x.data() + (rows - 1) * in, piece.rows = 1, piece.bias = bias.data();
  const std::vector<Bits> last = multiply<Bits>(k, piece);
  CHECK(std::equal(last.begin(), last.end(), y.end() - out), "the last of %lld rows",
        static_cast<long long>(rows));
}

// Where it is steep, flat, and nothing but x or zero.
void check_gelu() {
  const std::vector<float> x{-3e38f, -1e4f, -6.0f, -5.5f, -3.0f, -0.7f, 0.0f, 1e-6f, 0.7f, 3.0f, 6.0f, 3e38f};
  const auto count = static_cast<int64_t>(x.size());
  const std::vector<float> one{1.0f};
  const Panels<float> panels(x, count, 1);
  const std::vector<float> y =
      multiply<float>(cpu::kernels(), {1, 1, count, one.data(), panels.memory.data, nullptr, true, nullptr});
  for (int64_t i = 0; i < count; ++i) {
    const double exact = 0.5 * x[i] * std::erfc(-double{x[i]} / std::sqrt(2.0));
    CHECK(std::abs(y[i] - exact) <= 4e-7 * std::min(1.0, std::abs(double{x[i]})), "gelu(%g) is %g", x[i],
          y[i]);
  }
}

void check_products() {
  for (int64_t rows : {1, 2, 5, 7, 13, 97}) {
    for (int64_t in : {1, 2, 9, 256, 263, 264, 800}) {
      for (int64_t out : {1, 16, 33, 100}) {
        check_product<uint32_t>(rows, in, out, (rows + in + out) % 2 == 0);
        check_product<uint16_t>(rows, in, out, (rows + in + out) % 2 == 0);
      }
    }
  }
  check_product<uint32_t>(200, 768, 144, true);
  check_product<uint16_t>(200, 768, 144, true);
  // bf16: powers of two and their sums are exact.
  const uint16_t one = 0x3f80, half = 0x3f00, two = 0x4000, three = 0x4040;
  const std::vector<uint16_t> x{one, two, half, half}, weight{one, one, two, half}, bias{0, half};
  const Panels<uint16_t> panels(weight, 2, 2);
  const std::vector<uint16_t> y = multiply<uint16_t>(
      cpu::kernels(), {2, 2, 2, x.data(), panels.memory.data, bias.data(), false, nullptr});
  CHECK((y == std::vector<uint16_t>{three, 0x4060, one, 0x3fe0}), "%04x %04x %04x %04x", y[0], y[1], y[2],
        y[3]);
}

// The widening and rounding of bf16, by normalising a row of 1 and -1, whose normal form is itself.
void check_bf16() {
  const uint16_t one = 0x3f80, minus_one = 0xbf80, weight[2] = {0x4049, 0x3f81}, bias[2] = {0x3c00, 0x3c00};
  const uint16_t x[2] = {one, minus_one};
  uint16_t out[2];
  const Scratch scratch(cpu::kernels().norm_scratch(2));
  cpu::NormArgs args{};
  args.dim = 2, args.weight = weight, args.bias = bias, args.x = x, args.out = out;
  cpu::kernels().norm_rows[1](args, 0, 1, scratch.data);
  // 3.140625 + 2^-7 is halfway between two numbers, of which 0x404a is even; -(1 + 2^-7) + 2^-7 is -1.
  CHECK(out[0] == 0x404a && out[1] == minus_one, "%04x %04x", out[0], out[1]);
  const uint16_t infinities[2] = {0x7f80, 0xff80};
  args.bias = infinities;
  cpu::kernels().norm_rows[1](args, 0, 1, scratch.data);
  CHECK(out[0] == 0x7f80 && out[1] == 0xff80, "%04x %04x", out[0], out[1]);
  const uint16_t nans[2] = {0x7f81, 0xffff};  // one of which rounding up would make an infinity of
  args.bias = nans;
  cpu::kernels().norm_rows[1](args, 0, 1, scratch.data);
  for (uint16_t y : out) CHECK((y & 0x7fff) > 0x7f80, "%04x", y);
}

void check_rows() {
  const uint8_t keep[] = {0, 1, 255, 0, 0, 2};
  const int32_t slots[] = {9, 4, 7, 1, 0, 3}, cu[] = {0, 3, 3, 6};
  int32_t new_slots[6], new_cu[4];
  cpu::compact(keep, slots, cu, 3, true, new_slots, new_cu);
  CHECK((std::vector<int32_t>(new_cu, new_cu + 4) == std::vector<int32_t>{0, 3, 3, 5}), "keep_first");
  CHECK((std::vector<int32_t>(new_slots, new_slots + 5) == std::vector<int32_t>{9, 4, 7, 1, 3}),
        "keep_first");
  cpu::compact(keep, slots, cu, 3, false, new_slots, new_cu);
  CHECK((std::vector<int32_t>(new_cu, new_cu + 4) == std::vector<int32_t>{0, 2, 2, 3}), "keep");
  CHECK(new_slots[0] == 4 && new_slots[1] == 7 && new_slots[2] == 3, "keep");
  const char x[] = "aabbcc";
  const int32_t index[] = {2, 0}, inverse[] = {-1, 1};
  char y[4];
  cpu::gather_rows(x, index, 2, 0, 2, y);
  CHECK(std::string(y, 4) == "ccaa", "gather_rows");
  cpu::scatter_rows(x, inverse, 2, 0, 2, y);
  CHECK(std::string(y, 4) == std::string("\0\0bb", 4), "scatter_rows");
}

// What is taken once for the most queries and keys has to do for every sequence that has fewer of either.
void check_attention_scratch() {
  const cpu::AttentionShape shape{2, 1, 96, 0, 0, nullptr, nullptr, 1.0f};
  for (const bool importance : {false, true}) {
    for (const int64_t most_queries : {1, 3, 40}) {
      for (const int64_t most_keys : {1, 513, 600, 1100}) {
        const int64_t taken =
            cpu::kernels().attention_forward_scratch(shape, most_queries, most_keys, importance);
        for (int64_t keys = 0; keys <= most_keys; ++keys) {
          for (int64_t queries = 1; queries <= most_queries; ++queries) {
            const int64_t needed = cpu::kernels().attention_forward_scratch(shape, queries, keys, importance);
            CHECK(needed <= taken, "%lld queries, %lld keys", static_cast<long long>(queries),
                  static_cast<long long>(keys));
          }
        }
      }
    }
  }
}

std::set<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

// Not by what csrc/cpu/dispatch.cpp asks, which is under test.
bool processor_lacks(const std::string& isa) {
  const std::string avx512 = "avx2 fma avx512f avx512bw avx512dq avx512vl";
  const std::map<std::string, std::string> needed{
      {"avx2", "avx2 fma"}, {"avx512", avx512}, {"avx512bf16", avx512 + " avx512_bf16"}};
  const auto found = needed.find(isa);
  if (found == needed.end()) return false;  // a name that does not exist
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    const std::set<std::string> listed = words(line), flags = words(found->second);
    return !std::includes(listed.begin(), listed.end(), flags.begin(), flags.end());
  }
  return true;
}

}  // namespace

int main() {
  const char* value = std::getenv("TRANSKIMMER_CPU_ISA");
  const std::string wanted = value == nullptr ? "" : value;
  try {
    std::printf("instruction set %s\n", cpu::kernels().isa);
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return processor_lacks(wanted) ? 77 : 1;
  }
  CHECK(wanted.empty() || wanted == cpu::kernels().isa, "TRANSKIMMER_CPU_ISA is %s", wanted.c_str());
  for (bool weighted : {false, true}) {
    check_attentions<uint32_t>(weighted);
    check_attentions<uint16_t>(weighted);
  }
  check_plan();
  check_attention_scratch();
  for (int64_t dim : {2, 31, 64, 384, 1000}) check_norm<uint32_t>(dim), check_norm<uint16_t>(dim);
  check_bf16();
  check_gelu();
  check_products();
  check_rows();
  std::puts("ok");
  return 0;
}
