// How full the matrix instructions of short attention are on real lengths: prints, per data set, the share of
// query rows that hold a token, and what one tile per sequence would give; and checks the first.
//
//   attention_fill_test lengths.json

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "transkimmer/attention_plan.h"

namespace {

using namespace transkimmer;
using Lengths = std::vector<int>;

constexpr int kBatch = 32, kLayers = 12;
constexpr double kLeast = 0.85;

// {"name": [numbers], ...}
std::map<std::string, Lengths> read_lengths(const char* path) {
  std::ifstream file(path);
  std::map<std::string, Lengths> sets;
  std::string name;
  for (char c; file.get(c);) {
    if (c == '"') {
      std::getline(file, name, '"');
    } else if (std::isdigit(static_cast<unsigned char>(c))) {
      file.unget();
      file >> sets[name].emplace_back();
    }
  }
  return sets;
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Rows {
  int64_t used = 0, tiles = 0, own_16 = 0, own_64 = 0, batches = 0, served = 0;

  void add(const Lengths& lengths) {
    ++batches;
    if (*std::max_element(lengths.begin(), lengths.end()) > kLongestShortSequence) return;
    ++served;
    std::vector<int32_t> cu{0};
    for (int length : lengths) {
      cu.push_back(cu.back() + length);
      own_16 += round_up(length, kTileRows);
      own_64 += round_up(length, 64);
    }
    for (int64_t tile = 0; tile < attention_tiles(cu.back()); ++tile) {
      const TileSequences s = tile_sequences(cu.data(), static_cast<int64_t>(lengths.size()), tile);
      if (s.first != s.last) tiles += round_up(cu[s.last] - cu[s.first], kTileRows);
    }
    used += cu.back();
  }
};

// Every batch of a data set before each layer of a schedule that keeps `ratio` of the tokens per layer.
Rows count_rows(const Lengths& lengths, double ratio) {
  Rows rows;
  for (size_t begin = 0; begin + kBatch <= lengths.size(); begin += kBatch) {
    for (int layer = 1; layer <= kLayers; ++layer) {
      Lengths kept;
      for (int b = 0; b < kBatch; ++b) {
        kept.push_back(std::max(1, static_cast<int>(std::ceil(lengths[begin + b] * std::pow(ratio, layer)))));
      }
      rows.add(kept);
    }
  }
  return rows;
}

}  // namespace

int main(int count, char** arguments) {
  const auto sets = read_lengths(count > 1 ? arguments[1] : "");
  // Keep ratios per layer of the schedules in python/transkimmer/bench/workload.py.
  const std::vector<std::pair<std::string, double>> schedules{
      {"sst2", 0.913}, {"mrpc", 0.787}, {"rte", 0.806}, {"squad2", 0.865}, {"imdb", 0.821}};
  int failures = 0;
  std::printf("%-8s %8s %8s %18s %18s\n", "lengths", "served", "shared", "own 16-row tiles",
              "own 64-row tiles");
  for (const auto& [name, ratio] : schedules) {
    const Rows rows = count_rows(sets.at(name), ratio);
    const auto share = [](int64_t part, int64_t whole) {
      return whole ? static_cast<double>(part) / whole : 0.0;
    };
    const double fill = share(rows.used, rows.tiles);
    std::printf("%-8s %7.0f%% %7.1f%% %17.1f%% %17.1f%%\n", name.c_str(),
                100 * share(rows.served, rows.batches), 100 * fill, 100 * share(rows.used, rows.own_16),
                100 * share(rows.used, rows.own_64));
    if (fill < kLeast) {
      std::printf("FAILED %s: less than %.0f%% of the rows hold a token\n", name.c_str(), 100 * kLeast);
      ++failures;
    }
  }
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
