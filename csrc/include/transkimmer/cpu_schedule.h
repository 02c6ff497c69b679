// How a ragged attention is cut into pieces for threads. The pieces are pulled one at a time from a shared
// counter, so they must be small against a thread's share, but large against the cost of pulling one (tens of
// nanoseconds) and of packing keys and values once more per piece.
#pragma once

#include <algorithm>
#include <vector>

#include "transkimmer/cpu_kernels.h"

namespace transkimmer::cpu {

// Cost of one (sequence, head) in multiply-adds. The constants stand for packing keys and values and for the
// work that does not shrink with the sequence; they only have to be right to a factor of two.
inline int64_t attention_cost(int64_t queries, int64_t keys, int64_t head_dim) {
  return head_dim * (2 * queries * keys + 8 * keys + 4 * queries) + 2000;
}

// Below this many multiply-adds (about 10 us) waking a second thread costs more than it saves.
constexpr int64_t kSerialCost = 600'000;

struct AttentionPlan {
  std::vector<AttentionPiece> pieces;
  int64_t threads = 1, cost = 0;
  int64_t max_queries = 0, max_keys = 0;
};

// Cheap sequences are taken several heads at a time; a (sequence, head) that is too large for one thread's
// share is split by queries if `split_queries` (not where a piece must see every query of its keys).
inline AttentionPlan plan_attention(const AttentionShape& s, int64_t threads, bool split_queries) {
  AttentionPlan plan;
  const auto queries = [&](int64_t b) { return int64_t{s.cu_seqlens_q[b + 1]} - s.cu_seqlens_q[b]; };
  const auto keys = [&](int64_t b) { return int64_t{s.cu_seqlens_k[b + 1]} - s.cu_seqlens_k[b]; };
  for (int64_t b = 0; b < s.batch; ++b) {
    plan.cost += s.heads * attention_cost(queries(b), keys(b), s.head_dim);
    plan.max_queries = std::max(plan.max_queries, queries(b));
    plan.max_keys = std::max(plan.max_keys, keys(b));
  }
  plan.threads = plan.cost < kSerialCost ? 1 : std::max<int64_t>(threads, 1);
  const int64_t share = plan.cost / plan.threads + 1;
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t n = queries(b);
    if (n == 0 && keys(b) == 0) continue;
    const int64_t cost = attention_cost(n, keys(b), s.head_dim);
    const int64_t heads = plan.threads == 1 ? s.heads : std::clamp<int64_t>(share / 16 / cost, 1, s.heads);
    // A third of a share per piece: with dynamic pulling the last piece then costs at most that much idle
    // time.
    const int64_t parts = split_queries && plan.threads > 1
                              ? std::clamp<int64_t>(3 * cost / share, 1, std::max<int64_t>(n / 48, 1))
                              : 1;
    for (int64_t h = 0; h < s.heads; h += heads) {
      for (int64_t p = 0; p < parts; ++p) {
        plan.pieces.push_back({b, h, std::min(h + heads, s.heads), n * p / parts, n * (p + 1) / parts});
      }
    }
  }
  return plan;
}

}  // namespace transkimmer::cpu
