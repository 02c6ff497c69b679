// See lists.cpp.
#include "cuda/rows.cu"
#include "emulated/export.h"

EMULATED(move_rows)(const transkimmer::MoveRowsArguments* arguments, int scatter) {
  return scatter ? transkimmer::scatter_rows(*arguments, nullptr)
                 : transkimmer::gather_rows(*arguments, nullptr);
}
