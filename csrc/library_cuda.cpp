// Registers the CUDA kernels with PyTorch through its stable ABI: checks, outputs, device and stream. The
// schemas of operators are defined in Python, and the kernels know nothing of torch. Here are the operators
// on lists and rows; library_cuda_attention.cpp and library_cuda_skim.cpp hold the others. Those serve a part
// of their operator's contract, so they have names of their own and Python chooses
// (transkimmer_kernels/ops/*/cuda.py).

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "cuda_checks.h"
#include "cuda_lists.h"
#include "transkimmer/interface.h"
#include "transkimmer/rows.cuh"

TRANSKIMMER_DESCRIBE_LIBRARY(cuda, TRANSKIMMER_CUDA_ARCHITECTURES);

namespace {

using namespace transkimmer::checks;
using torch::stable::accelerator::DeviceGuard;

std::tuple<Tensor, Tensor> compact(const Tensor& keep, const Tensor& slots, const Tensor& cu_seqlens,
                                   bool keep_first) {
  const int32_t device = slots.get_device_index();
  check_vector("keep", keep, ScalarType::Bool, device);
  check_size("keep", keep.numel(), check_slots(slots, device));
  check_offsets("cu_seqlens", cu_seqlens, device);
  const DeviceGuard guard(device);
  return transkimmer::compact_list(keep, slots, cu_seqlens, keep_first, device);
}

// Moves rows of `x` into `rows` new ones, by slots that name rows of either.
Tensor move_rows(const Tensor& x, const Tensor& slots, const Tensor& cu_seqlens, int64_t rows,
                 const char* name, cudaError_t (*move)(const transkimmer::MoveRowsArguments&, cudaStream_t)) {
  const int32_t device = slots.get_device_index();
  check_device("x", x, device);
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_contiguous(), "x must be contiguous and have at least one dimension");
  std::vector<int64_t> shape{rows};
  int64_t row_bytes = static_cast<int64_t>(x.element_size());
  for (int64_t i = 1; i < x.dim(); ++i) {
    shape.push_back(x.size(i));
    row_bytes *= x.size(i);
  }
  const DeviceGuard guard(device);
  Tensor y = torch::stable::new_empty(x, shape);
  transkimmer::MoveRowsArguments arguments{};
  arguments.source = x.const_data_ptr();
  arguments.target = y.mutable_data_ptr();
  arguments.slots = slots.const_data_ptr<int32_t>();
  arguments.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  arguments.capacity = check_slots(slots, device);
  arguments.batch = check_offsets("cu_seqlens", cu_seqlens, device);
  arguments.row_bytes = row_bytes;
  arguments.target_rows = rows;
  check_launch(name, move(arguments, current_stream(device)));
  return y;
}

Tensor gather_rows(const Tensor& x, const Tensor& slots, const Tensor& cu_seqlens) {
  return move_rows(x, slots, cu_seqlens, slots.numel(), "gather_rows", transkimmer::gather_rows);
}

Tensor scatter_rows(const Tensor& x, const Tensor& slots, const Tensor& cu_seqlens, int64_t num_rows) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(0) == slots.numel(), "x must have one row for each of the ",
                  slots.numel(), " slots");
  STD_TORCH_CHECK(num_rows >= 0, "num_rows is ", num_rows, "; it must not be negative");
  return move_rows(x, slots, cu_seqlens, num_rows, "scatter_rows", transkimmer::scatter_rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(transkimmer, CUDA, library) {
  library.impl("compact.cuda", TORCH_BOX(&compact));
  library.impl("gather_rows.cuda", TORCH_BOX(&gather_rows));
  library.impl("scatter_rows.cuda", TORCH_BOX(&scatter_rows));
}

#define PREDICTOR                                                                                          \
  "Tensor norm1_weight, Tensor norm1_bias, Tensor fc_weight, Tensor fc_bias, Tensor norm2_weight, Tensor " \
  "norm2_bias, Tensor out_weight, Tensor out_bias, float eps"

STABLE_TORCH_LIBRARY(transkimmer_cuda, library) {
  library.def(
      "short_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int "
      "max_seqlen_k, "
      "float scale, Tensor? keep, bool return_importance) -> (Tensor, Tensor, Tensor)");
  library.def("skim_logit(Tensor hidden, Tensor slots, Tensor cu_seqlens, " PREDICTOR ") -> Tensor");
  library.def("skim_tokens(Tensor hidden, Tensor slots, Tensor cu_seqlens, " PREDICTOR
              ", float logit_threshold, bool keep_first) -> (Tensor, Tensor)");
}
