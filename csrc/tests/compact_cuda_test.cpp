// Steps through the CUDA kernel of `compact` on the host (cuda_emulation/) and compares it with a plain loop.

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/compact.cu"  // with cuda_emulation/ in the place of the CUDA headers

namespace {

using transkimmer::CompactArguments;
using transkimmer::pack_tile;
using transkimmer::TileFlag;

constexpr int32_t kUnwritten = -1;

struct Case {
  std::vector<uint8_t> keep;
  std::vector<int32_t> slots, cu_seqlens;
};

struct Result {
  std::vector<int32_t> slots, cu_seqlens;
  bool operator==(const Result&) const = default;
};

// Sequences of length 0..max_length; behind the last token `spare` positions follow, whose mask is set but
// must not count.
Case make_case(std::mt19937& random, int batch, int max_length, int spare, double keep_rate) {
  Case c;
  c.cu_seqlens.push_back(0);
  for (int b = 0; b < batch; ++b) {
    c.cu_seqlens.push_back(c.cu_seqlens.back() + std::uniform_int_distribution<int>(0, max_length)(random));
  }
  const int count = c.cu_seqlens.back();
  for (int i = 0; i < count + spare; ++i) {
    c.keep.push_back(i >= count || std::bernoulli_distribution(keep_rate)(random));
    c.slots.push_back(3 * i + 1);
  }
  return c;
}

// Slots behind the last survivor stay as they were.
Result expected(const Case& c, bool keep_first) {
  Result result{{}, {0}};
  for (size_t b = 0; b + 1 < c.cu_seqlens.size(); ++b) {
    for (int i = c.cu_seqlens[b]; i < c.cu_seqlens[b + 1]; ++i) {
      if (c.keep[i] || (keep_first && i == c.cu_seqlens[b])) result.slots.push_back(c.slots[i]);
    }
    result.cu_seqlens.push_back(static_cast<int32_t>(result.slots.size()));
  }
  result.slots.resize(c.slots.size(), kUnwritten);
  return result;
}

template <class Launch>
Result actual(const Case& c, bool keep_first, int64_t tile, Launch launch, size_t shift = 0) {
  std::vector<uint8_t> mask(shift, 1);  // so that the mask begins anywhere
  mask.insert(mask.end(), c.keep.begin(), c.keep.end());
  Result result{std::vector<int32_t>(c.slots.size(), kUnwritten),
                std::vector<int32_t>(c.cu_seqlens.size(), kUnwritten)};
  std::vector<uint64_t> workspace(transkimmer::compact_workspace(static_cast<int64_t>(c.slots.size()), tile));
  launch(CompactArguments{mask.data() + shift, c.slots.data(), c.cu_seqlens.data(), result.slots.data(),
                          result.cu_seqlens.data(), workspace.empty() ? nullptr : workspace.data(),
                          static_cast<int64_t>(c.slots.size()), static_cast<int64_t>(c.cu_seqlens.size()) - 1,
                          keep_first});
  return result;
}

int failures = 0;

void check(const char* what, const Case& c, bool keep_first, const Result& result) {
  if (result == expected(c, keep_first)) return;
  std::printf("FAILED %s: capacity %zu, batch %zu, keep_first %d\n", what, c.slots.size(),
              c.cu_seqlens.size() - 1, keep_first);
  ++failures;
}

// The launch that ships, at sizes around one tile of 4096 positions and beyond.
void check_shipped(std::mt19937& random) {
  std::vector<Case> cases{make_case(random, 0, 0, 0, 0.5),      make_case(random, 3, 0, 0, 0.5),
                          make_case(random, 3, 0, 40, 0.5),     make_case(random, 40, 50, 9, 0.3),
                          make_case(random, 900, 6, 3000, 0.4), make_case(random, 70, 300, 100, 0.0),
                          make_case(random, 30, 300, 0, 1.0)};
  for (int capacity : {4095, 4096, 4097, 8192, 20'000, 16 * 4096, 16 * 4096 + 1}) {
    Case c = make_case(random, 0, 0, capacity, 0.5);
    c.cu_seqlens = {0, 0, 1, capacity / 2, capacity, capacity, capacity};  // ends in empty sequences
    for (auto& keep : c.keep) keep = random() % 2;
    cases.push_back(c);
  }
  for (const Case& c : cases) {
    for (bool keep_first : {false, true}) {
      check("shipped launch", c, keep_first,
            actual(
                c, keep_first, transkimmer::kCompactTile,
                [](const auto& arguments) { transkimmer::compact(arguments, nullptr); }, random() % 32));
    }
  }
}

// Small tiles, so that look-back crosses several windows of 32; after each block its inclusive count is
// mostly turned back into its own count, as if the block had not got further yet.
void check_look_back(std::mt19937& random) {
  constexpr int kThreads = 64, kWordsPerWarp = 2;
  constexpr int64_t kTile = kThreads * kWordsPerWarp;
  for (double stays_inclusive : {0.0, 0.03, 0.5}) {
    const Case c = make_case(random, 400, 60, 500, 0.4);
    const auto launch = [&](const CompactArguments& arguments) {
      uint32_t before = 0;
      emulation::after_block = [&] {
        uint64_t& state =
            arguments.workspace[arguments.workspace[0]];  // the ticket counts from 0, states from 1
        if (transkimmer::tile_flag(state) == TileFlag::kEmpty) return;  // a tile behind the last token
        const uint32_t inclusive = transkimmer::tile_count(state);
        if (!std::bernoulli_distribution(stays_inclusive)(random)) {
          state = pack_tile(TileFlag::kOwn, inclusive - before);
        }
        before = inclusive;
      };
      emulation::run(static_cast<unsigned>(transkimmer::compact_tiles(arguments.capacity, kTile)), kThreads,
                     [&] { transkimmer::compact_kernel<kThreads, kWordsPerWarp>(arguments); });
      emulation::after_block = [] {};
    };
    check("look-back", c, true, actual(c, true, kTile, launch));
  }
}

using transkimmer::compact_tiles, transkimmer::compact_workspace;
static_assert(compact_tiles(0, 128) == 1 && compact_tiles(128, 128) == 1 && compact_tiles(129, 128) == 2);
static_assert(compact_workspace(16 * 128, 128) == 0 && compact_workspace(16 * 128 + 1, 128) == 18);
static_assert(transkimmer::nonzero_bytes(0x00018000u) == 0x00010100u &&
              transkimmer::nonzero_bytes(0xff000002u) == 0x01000001u);
static_assert(compact_tiles(0x7fffffff, transkimmer::kCompactTile) == 524288);
constexpr uint64_t kState = pack_tile(TileFlag::kInclusive, 0xffffffffu);
static_assert(transkimmer::tile_flag(kState) == TileFlag::kInclusive &&
              transkimmer::tile_count(kState) == 0xffffffffu);
static_assert(transkimmer::tile_flag(0) == TileFlag::kEmpty,
              "a zeroed workspace means that nothing is published");
static_assert(transkimmer::bits_below(0) == 0 && transkimmer::bits_below(31) == 0x7fffffffu);

}  // namespace

int main() {
  std::mt19937 random(7);
  check_shipped(random);
  check_look_back(random);
  if (failures == 0) std::printf("compact: the kernel agrees with the plain loop\n");
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
