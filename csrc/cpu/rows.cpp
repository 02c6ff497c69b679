// Row movement and compaction: no arithmetic, so one version for every instruction set (memcpy picks its
// own).
#include <cstring>

#include "transkimmer/cpu_kernels.h"

namespace transkimmer::cpu {

// One pass over the list. Every entry is stored at the write position and the position advances by 0 or 1: no
// branch to mispredict on random masks. The store is in bounds since the write position never passes the read
// one. A tensor of bools may hold other bytes than 0 and 1 (a view of bytes), which C++'s bool may not.
void compact(const uint8_t* keep, const int32_t* slots, const int32_t* cu_seqlens, int64_t batch,
             bool keep_first, int32_t* new_slots, int32_t* new_cu_seqlens) {
  int64_t kept = 0;
  new_cu_seqlens[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = cu_seqlens[b], end = cu_seqlens[b + 1];
    for (int64_t i = begin; i < end; ++i) {
      new_slots[kept] = slots[i];
      kept += keep[i] != 0 || (keep_first && i == begin);
    }
    new_cu_seqlens[b + 1] = static_cast<int32_t>(kept);
  }
}

void gather_rows(const char* x, const int32_t* slots, int64_t row_bytes, int64_t begin, int64_t end,
                 char* y) {
  if (row_bytes == 0) return;  // then a pointer may be null, which memcpy and memset do not take
  for (int64_t i = begin; i < end; ++i) std::memcpy(y + i * row_bytes, x + slots[i] * row_bytes, row_bytes);
}

void scatter_rows(const char* x, const int32_t* inverse, int64_t row_bytes, int64_t begin, int64_t end,
                  char* y) {
  if (row_bytes == 0) return;
  for (int64_t r = begin; r < end; ++r) {
    if (inverse[r] >= 0) {
      std::memcpy(y + r * row_bytes, x + inverse[r] * row_bytes, row_bytes);
    } else {
      std::memset(y + r * row_bytes, 0, row_bytes);
    }
  }
}

}  // namespace transkimmer::cpu
