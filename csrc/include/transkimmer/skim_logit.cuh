// The skim predictor on CUDA. Contract and layout: csrc/cuda/skim_logit.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "transkimmer/float16.h"
#include "transkimmer/host_device.h"

namespace transkimmer {

struct SkimLogitArguments {
  const void* hidden;    // [rows, width], like all matrices and vectors here dense and aligned to 16 bytes
  const int32_t* slots;  // [capacity]
  const int32_t* cu_seqlens;  // [batch + 1]; the last entry, read on the device, counts the valid slots
  const void *norm1_weight, *norm1_bias;                         // [width]
  const void* fc_weight;                                         // [inner, width]
  const void *fc_bias, *norm2_weight, *norm2_bias, *out_weight;  // [inner]
  const void* out_bias;                                          // [1]
  float* logit;                                                  // [capacity], or null
  uint8_t* keep;  // [capacity], or null: whether a logit is not below the threshold, so 1 for NaN
  int64_t capacity, batch;
  int width, inner;  // skim_logit_fits
  float eps, threshold;
};

// Widths that the kernel is compiled for; Triton serves the others.
TRANSKIMMER_HOST_DEVICE constexpr bool skim_logit_fits(int64_t width, int64_t inner) {
  return width > 0 && width <= 1024 && width % 64 == 0 && inner == 192;
}

// Enqueues the kernel and returns. Allocates nothing and never waits for the device: a graph can capture it.
cudaError_t skim_logit(const SkimLogitArguments& arguments, Float16 format, cudaStream_t stream);

}  // namespace transkimmer
