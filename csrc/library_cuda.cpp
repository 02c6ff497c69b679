// Registers the CUDA kernels with PyTorch through its stable ABI. The schemas are defined in Python; the
// kernels know nothing of torch. Here: checks that keep a kernel from reading astray, outputs, device and
// stream.

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <limits>
#include <tuple>

#include "transkimmer/compact.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A dense vector of `dtype` on the device of the operator's first argument.
void check_vector(const char* name, const Tensor& tensor, ScalarType dtype, int32_t device) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous(), name, " must be a contiguous vector, got ",
                  tensor.dim(), " dimensions");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has a dtype that this kernel does not take");
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, name, " must be on CUDA device ",
                  device, " like the other arguments");
}

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* name, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

std::tuple<Tensor, Tensor> compact(const Tensor& keep, const Tensor& slots, const Tensor& cu_seqlens,
                                   bool keep_first) {
  const int32_t device = slots.get_device_index();
  check_vector("keep", keep, ScalarType::Bool, device);
  check_vector("slots", slots, ScalarType::Int, device);
  check_vector("cu_seqlens", cu_seqlens, ScalarType::Int, device);
  STD_TORCH_CHECK(keep.numel() == slots.numel(), "keep has ", keep.numel(), " entries, slots has ",
                  slots.numel());
  STD_TORCH_CHECK(cu_seqlens.numel() >= 1, "cu_seqlens is empty; it must hold batch + 1 offsets");
  STD_TORCH_CHECK(slots.numel() <= std::numeric_limits<int32_t>::max(), "slots has ", slots.numel(),
                  " entries; at most 2^31 - 1 are allowed");

  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor new_slots = torch::stable::empty_like(slots);
  Tensor new_cu_seqlens = torch::stable::empty_like(cu_seqlens);
  const std::array<int64_t, 1> words{
      transkimmer::compact_workspace(slots.numel(), transkimmer::kCompactTile)};
  const Tensor workspace = torch::stable::new_zeros(slots, {words.data(), words.size()}, ScalarType::Long);
  const transkimmer::CompactArguments arguments{
      .keep = static_cast<const uint8_t*>(keep.const_data_ptr()),
      .slots = slots.const_data_ptr<int32_t>(),
      .cu_seqlens = cu_seqlens.const_data_ptr<int32_t>(),
      .new_slots = new_slots.mutable_data_ptr<int32_t>(),
      .new_cu_seqlens = new_cu_seqlens.mutable_data_ptr<int32_t>(),
      .workspace = words[0] ? static_cast<uint64_t*>(workspace.mutable_data_ptr()) : nullptr,
      .capacity = slots.numel(),
      .batch = cu_seqlens.numel() - 1,
      .keep_first = keep_first,
  };
  check_launch("compact", transkimmer::compact(arguments, current_stream(device)));
  return {new_slots, new_cu_seqlens};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transkimmer, CUDA, library) { library.impl("compact.cuda", TORCH_BOX(&compact)); }
