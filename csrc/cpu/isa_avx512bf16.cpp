// The kernels of AVX-512, and products of bf16 by the instructions that multiply it in pairs. Its flags are
// in cmake/cpu.cmake.
#define TRANSKIMMER_ISA avx512bf16

#include "transkimmer/cpu_kernels.h"
#include "vec_avx512.h"

#include "product.h"

namespace transkimmer::cpu {

namespace avx512 {
extern const Kernels table;
}

namespace avx512bf16 {

extern const Kernels& table();
const Kernels& table() {
  static const Kernels kernels = [] {
    Kernels k = avx512::table;
    constexpr int kBf16 = static_cast<int>(DType::kBFloat16);
    k.isa = "avx512bf16";
    k.pack_panels[kBf16] = pack_panels<bf16>;
    k.product_scratch[kBf16] = product_scratch<bf16>;
    k.product[kBf16] = product<bf16>;
    return k;
  }();
  return kernels;
}

}  // namespace avx512bf16

}  // namespace transkimmer::cpu
