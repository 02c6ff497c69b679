#define TRANSKIMMER_ISA generic
#include "transkimmer/cpu_kernels.h"
#include "vec_generic.h"
// The vector type comes first: every kernel is written in terms of it.
#include "isa_table.h"
