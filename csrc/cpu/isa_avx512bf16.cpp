// The CPU kernels compiled for AVX-512 with conversion to bf16 and its multiplication in pairs; see
// isa_table.h. Its flags are in cmake/cpu.cmake.
#define TRANSKIMMER_ISA avx512bf16

#include "transkimmer/cpu_kernels.h"
#include "vec_avx512.h"

#include "isa_table.h"
