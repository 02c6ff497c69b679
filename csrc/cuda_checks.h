// What the registrations of CUDA operators share: checks that keep a kernel from reading astray, and the
// stream. Nothing here looks at values: that would wait for the device.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>

#include "transkimmer/float16.h"

namespace transkimmer::checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

// On the device that the operator runs on.
inline void check_device(const char* name, const Tensor& tensor, int32_t device) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name, " must be on CUDA device ",
                  device, " like the other arguments");
}

inline void check_dense(const char* name, const Tensor& tensor, int64_t dim, ScalarType dtype,
                        int32_t device) {
  STD_TORCH_CHECK(tensor.dim() == dim && tensor.is_contiguous(), name, " must be contiguous and have ", dim,
                  " dimension(s), got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has dtype ",
                  torch::headeronly::toString(tensor.scalar_type()), "; expected ",
                  torch::headeronly::toString(dtype));
  check_device(name, tensor, device);
}

inline void check_vector(const char* name, const Tensor& tensor, ScalarType dtype, int32_t device) {
  check_dense(name, tensor, 1, dtype, device);
}

inline void check_size(const char* name, int64_t have, int64_t want) {
  STD_TORCH_CHECK(have == want, name, " has size ", have, "; expected ", want);
}

inline void check_aligned(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name,
                  " must begin at a multiple of 16 bytes");
}

// int32 offsets [batch + 1]; returns the batch.
inline int64_t check_offsets(const char* name, const Tensor& cu_seqlens, int32_t device) {
  check_vector(name, cu_seqlens, ScalarType::Int, device);
  STD_TORCH_CHECK(cu_seqlens.numel() >= 1, name, " is empty; it must hold batch + 1 offsets");
  return cu_seqlens.numel() - 1;
}

// int32 slots [capacity]; returns the capacity.
inline int64_t check_slots(const Tensor& slots, int32_t device) {
  check_vector("slots", slots, ScalarType::Int, device);
  STD_TORCH_CHECK(slots.numel() <= kMost, "slots has ", slots.numel(),
                  " entries; at most 2^31 - 1 are allowed");
  return slots.numel();
}

inline Float16 check_float16(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, name, " has dtype ",
                  torch::headeronly::toString(dtype), "; this kernel takes float16 and bfloat16");
  return dtype == ScalarType::Half ? Float16::kFp16 : Float16::kBf16;
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* name, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

}  // namespace transkimmer::checks
