// Registers skim_logit and skim_tokens: see library_cuda.cpp.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda_checks.h"
#include "cuda_lists.h"
#include "transkimmer/skim_logit.cuh"

namespace {

using namespace transkimmer::checks;
using torch::stable::accelerator::DeviceGuard;

// The predictor's weights in the order of the schema.
struct Predictor {
  const Tensor &norm1_weight, &norm1_bias, &fc_weight, &fc_bias, &norm2_weight, &norm2_bias, &out_weight,
      &out_bias;
};

const void* check_weights(const char* name, const Tensor& x, int64_t size, const Tensor& hidden,
                          int32_t device) {
  check_vector(name, x, hidden.scalar_type(), device);
  check_size(name, x.numel(), size);
  check_aligned(name, x);
  return x.const_data_ptr();
}

transkimmer::SkimLogitArguments check_predictor(const Tensor& hidden, const Tensor& slots,
                                                const Tensor& cu_seqlens, const Predictor& p, double eps) {
  const int32_t device = slots.get_device_index();
  const ScalarType dtype = hidden.scalar_type();
  check_dense("hidden", hidden, 2, dtype, device);
  check_aligned("hidden", hidden);
  check_dense("fc_weight", p.fc_weight, 2, dtype, device);
  check_aligned("fc_weight", p.fc_weight);
  const int64_t width = hidden.size(1), inner = p.fc_weight.size(0);
  check_size("fc_weight", p.fc_weight.size(1), width);
  STD_TORCH_CHECK(transkimmer::skim_logit_fits(width, inner), "hidden has width ", width,
                  " and the predictor ", inner, "; this kernel takes multiples of 64 up to 1024, and 192");
  transkimmer::SkimLogitArguments arguments{};
  arguments.hidden = hidden.const_data_ptr();
  arguments.slots = slots.const_data_ptr<int32_t>();
  arguments.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  arguments.capacity = check_slots(slots, device);
  arguments.batch = check_offsets("cu_seqlens", cu_seqlens, device);
  arguments.norm1_weight = check_weights("norm1_weight", p.norm1_weight, width, hidden, device);
  arguments.norm1_bias = check_weights("norm1_bias", p.norm1_bias, width, hidden, device);
  arguments.fc_weight = p.fc_weight.const_data_ptr();
  arguments.fc_bias = check_weights("fc_bias", p.fc_bias, inner, hidden, device);
  arguments.norm2_weight = check_weights("norm2_weight", p.norm2_weight, inner, hidden, device);
  arguments.norm2_bias = check_weights("norm2_bias", p.norm2_bias, inner, hidden, device);
  arguments.out_weight = check_weights("out_weight", p.out_weight, inner, hidden, device);
  check_vector("out_bias", p.out_bias, dtype, device);
  check_size("out_bias", p.out_bias.numel(), 1);
  arguments.out_bias = p.out_bias.const_data_ptr();
  arguments.width = static_cast<int>(width);
  arguments.inner = static_cast<int>(inner);
  arguments.eps = static_cast<float>(eps);
  return arguments;
}

Tensor skim_logit(const Tensor& hidden, const Tensor& slots, const Tensor& cu_seqlens,
                  const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& fc_weight,
                  const Tensor& fc_bias, const Tensor& norm2_weight, const Tensor& norm2_bias,
                  const Tensor& out_weight, const Tensor& out_bias, double eps) {
  const Predictor predictor{norm1_weight, norm1_bias, fc_weight,  fc_bias,
                            norm2_weight, norm2_bias, out_weight, out_bias};
  auto arguments = check_predictor(hidden, slots, cu_seqlens, predictor, eps);
  const int32_t device = slots.get_device_index();
  const DeviceGuard guard(device);
  Tensor logit = torch::stable::new_empty(hidden, {slots.numel()}, ScalarType::Float);
  arguments.logit = logit.mutable_data_ptr<float>();
  check_launch("skim_logit",
               transkimmer::skim_logit(arguments, check_float16("hidden", hidden), current_stream(device)));
  return logit;
}

std::tuple<Tensor, Tensor> skim_tokens(const Tensor& hidden, const Tensor& slots, const Tensor& cu_seqlens,
                                       const Tensor& norm1_weight, const Tensor& norm1_bias,
                                       const Tensor& fc_weight, const Tensor& fc_bias,
                                       const Tensor& norm2_weight, const Tensor& norm2_bias,
                                       const Tensor& out_weight, const Tensor& out_bias, double eps,
                                       double logit_threshold, bool keep_first) {
  const Predictor predictor{norm1_weight, norm1_bias, fc_weight,  fc_bias,
                            norm2_weight, norm2_bias, out_weight, out_bias};
  auto arguments = check_predictor(hidden, slots, cu_seqlens, predictor, eps);
  const int32_t device = slots.get_device_index();
  const DeviceGuard guard(device);
  Tensor keep = torch::stable::new_empty(slots, {slots.numel()}, ScalarType::Bool);
  arguments.keep = static_cast<uint8_t*>(keep.mutable_data_ptr());
  arguments.threshold = static_cast<float>(logit_threshold);
  check_launch("skim_tokens",
               transkimmer::skim_logit(arguments, check_float16("hidden", hidden), current_stream(device)));
  return transkimmer::compact_list(keep, slots, cu_seqlens, keep_first, device);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transkimmer_cuda, CUDA, library) {
  library.impl("skim_logit", TORCH_BOX(&skim_logit));
  library.impl("skim_tokens", TORCH_BOX(&skim_tokens));
}
