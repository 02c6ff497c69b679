#define TRANSKIMMER_ISA avx512
#include "transkimmer/cpu_kernels.h"
#include "vec_avx512.h"
// The vector type comes first: every kernel is written in terms of it.
#include "isa_table.h"
