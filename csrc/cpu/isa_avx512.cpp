// The CPU kernels compiled for one instruction set; see isa_table.h. Its flags are in cmake/cpu.cmake.
#define TRANSKIMMER_ISA avx512

#include "transkimmer/cpu_kernels.h"
#include "vec_avx512.h"

#include "isa_table.h"
