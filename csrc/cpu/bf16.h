// Storage type of bfloat16: the upper half of a float. No arithmetic; the vec_*.h files convert whole
// vectors.
#pragma once

#include <cstdint>

namespace transkimmer::cpu {

struct bf16 {
  uint16_t bits;
};

}  // namespace transkimmer::cpu
