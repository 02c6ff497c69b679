// CUDA kernels, stepped through on the host (../cuda_emulation), behind functions that Python can call with
// tensors in the host's memory: tests/ops/test_emulated_cuda.py.
#include "cuda/compact.cu"
#include "emulated/export.h"

EMULATED(compact)(const transkimmer::CompactArguments* arguments) {
  return transkimmer::compact(*arguments, nullptr);
}
