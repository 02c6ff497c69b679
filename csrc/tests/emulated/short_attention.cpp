// See lists.cpp.
#include "cuda/short_attention.cu"
#include "emulated/export.h"

using transkimmer::Float16;

EMULATED(short_attention)(const transkimmer::ShortAttentionArguments* arguments, int bf16) {
  return transkimmer::short_attention(*arguments, bf16 ? Float16::kBf16 : Float16::kFp16, nullptr);
}
