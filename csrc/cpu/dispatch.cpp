// Which instruction set runs: the best this machine has, or the one TRANSKIMMER_CPU_ISA names.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "transkimmer/cpu_kernels.h"

namespace transkimmer::cpu {

namespace generic {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#if defined(TRANSKIMMER_HAS_AVX512BF16)
namespace avx512bf16 {
extern const Kernels table;
}
#endif
#endif

namespace {

// What the isa_*.cpp are compiled for must be what is asked of the processor here.
const Kernels* find(const std::string& isa) {
  if (isa == "generic") return &generic::table;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx2" && has_avx2) return &avx2::table;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
  if (isa == "avx512" && has_avx512) return &avx512::table;
#if defined(TRANSKIMMER_HAS_AVX512BF16)
  if (isa == "avx512bf16" && has_avx512 && __builtin_cpu_supports("avx512bf16")) return &avx512bf16::table;
#endif
#endif
  return nullptr;
}

const Kernels& choose() {
  const char* wanted = std::getenv("TRANSKIMMER_CPU_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    const Kernels* named = find(wanted);
    if (named != nullptr) return *named;
    throw std::runtime_error(
        "TRANSKIMMER_CPU_ISA is '" + std::string(wanted) +
        "'; allowed are generic, avx2, avx512 and avx512bf16, as far as this machine supports them");
  }
  for (const char* isa : {"avx512bf16", "avx512", "avx2"}) {
    if (const Kernels* best = find(isa)) return *best;
  }
  return *find("generic");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace transkimmer::cpu
