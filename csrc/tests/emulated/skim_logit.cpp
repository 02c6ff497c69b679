// See lists.cpp.
#include "cuda/skim_logit.cu"
#include "emulated/export.h"

using transkimmer::Float16;

EMULATED(skim_logit)(const transkimmer::SkimLogitArguments* arguments, int bf16) {
  return transkimmer::skim_logit(*arguments, bf16 ? Float16::kBf16 : Float16::kFp16, nullptr);
}
