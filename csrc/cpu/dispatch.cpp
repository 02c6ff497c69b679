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
#endif

namespace {

// What isa_avx2.cpp and isa_avx512.cpp are compiled for must be what is asked of the processor here.
const Kernels* find(const std::string& isa) {
  if (isa == "generic") return &generic::table;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx2" && has_avx2) return &avx2::table;
  if (isa == "avx512" && has_avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return &avx512::table;
  }
#endif
  return nullptr;
}

const Kernels& choose() {
  const char* wanted = std::getenv("TRANSKIMMER_CPU_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    const Kernels* named = find(wanted);
    if (named != nullptr) return *named;
    throw std::runtime_error("TRANSKIMMER_CPU_ISA is '" + std::string(wanted) +
                             "'; allowed are generic, avx2 and avx512, as far as this machine supports them");
  }
  for (const char* isa : {"avx512", "avx2"}) {
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
