// Steps through the CUDA kernels of gather_rows and scatter_rows on the host (cuda_emulation/) and compares
// them with a plain loop.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/rows.cu"  // with cuda_emulation/ in the place of the CUDA headers

namespace {

int failures = 0;

// `count` of `capacity` slots are listed; the others name no row. `shift`: bytes by which both tensors miss
// an alignment of 16.
void check(std::mt19937& random, int count, int capacity, int rows, int64_t row_bytes, int shift) {
  std::vector<int32_t> slots(rows), cu{0, count / 2, count / 2, count};
  std::iota(slots.begin(), slots.end(), 0);
  std::shuffle(slots.begin(), slots.end(), random);
  slots.resize(count);
  slots.resize(capacity, 2000000000);
  const auto bytes = [&](int64_t n) {
    std::vector<uint4> storage((n * row_bytes + shift) / 16 + 2);
    auto* const p = reinterpret_cast<uint8_t*>(storage.data());
    std::generate(p, p + storage.size() * 16, [&] { return static_cast<uint8_t>(random()); });
    return storage;
  };
  for (bool scatter : {false, true}) {
    const auto source = bytes(scatter ? capacity : rows);
    auto target = bytes(scatter ? rows : capacity), expected = target;
    const auto* const from = reinterpret_cast<const uint8_t*>(source.data()) + shift;
    auto* const plain = reinterpret_cast<uint8_t*>(expected.data()) + shift;
    if (scatter) std::fill_n(plain, rows * row_bytes, 0);
    for (int i = 0; i < count; ++i) {
      std::copy_n(from + (scatter ? i : slots[i]) * row_bytes, row_bytes,
                  plain + (scatter ? slots[i] : i) * row_bytes);
    }
    transkimmer::MoveRowsArguments arguments{};
    arguments.source = from;
    arguments.target = reinterpret_cast<uint8_t*>(target.data()) + shift;
    arguments.slots = slots.data();
    arguments.cu_seqlens = cu.data();
    arguments.capacity = capacity;
    arguments.batch = 3;
    arguments.row_bytes = row_bytes;
    arguments.target_rows = scatter ? rows : capacity;
    const cudaError_t error = scatter ? transkimmer::scatter_rows(arguments, nullptr)
                                      : transkimmer::gather_rows(arguments, nullptr);
    if (error == cudaSuccess && std::memcmp(target.data(), expected.data(), target.size() * 16) == 0)
      continue;
    std::printf("FAILED %s: %d rows of %d bytes, shift %d\n", scatter ? "scatter" : "gather", count,
                static_cast<int>(row_bytes), shift);
    ++failures;
  }
}

}  // namespace

int main() {
  std::mt19937 random(7);
  for (int64_t row_bytes : {1, 2, 6, 8, 24, 66, 384, 1536, 4096}) {
    for (int shift : {0, 1, 2, 4, 8}) {
      check(random, 13, 18, 20, row_bytes, shift);
    }
  }
  check(random, 0, 5, 7, 32, 0);
  check(random, 0, 0, 7, 32, 0);
  check(random, 0, 0, 0, 32, 0);
  check(random, 7, 7, 7, 0, 0);
  check(random, 600, 700, 650, 3, 0);
  if (failures == 0) std::printf("rows: the kernels agree with the plain loop\n");
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
