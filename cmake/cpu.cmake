# The CPU library: torch-free kernels in csrc/cpu, of which isa_<name>.cpp is the same code compiled for one instruction
# set (which of them runs is decided at run time), and their registration. Only x86-64 has more than isa_generic.cpp.
set(TRANSKIMMER_FLAGS_generic none)
set(TRANSKIMMER_FLAGS_avx2 -mavx2 -mfma)
set(TRANSKIMMER_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma)

set(TRANSKIMMER_FLAGS_avx512bf16 ${TRANSKIMMER_FLAGS_avx512} -mavx512bf16)

file(GLOB cpu_kernels CONFIGURE_DEPENDS csrc/cpu/*.cpp)
string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" processor)
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-mavx512bf16 TRANSKIMMER_COMPILES_AVX512BF16)  # GCC 10, Clang 9
set(TRANSKIMMER_ISAS generic)
foreach(isa avx2 avx512 avx512bf16)
  set(file "${CMAKE_SOURCE_DIR}/csrc/cpu/isa_${isa}.cpp")
  if(isa STREQUAL avx512bf16 AND NOT TRANSKIMMER_COMPILES_AVX512BF16)
    list(REMOVE_ITEM cpu_kernels "${file}")
  elseif(processor MATCHES "^(x86_64|amd64)$")
    set_source_files_properties("${file}" PROPERTIES COMPILE_OPTIONS "${TRANSKIMMER_FLAGS_${isa}}")
    list(APPEND TRANSKIMMER_ISAS ${isa})
  else()
    list(REMOVE_ITEM cpu_kernels "${file}")
  endif()
endforeach()

# A library of its own, so that the C++ self-checks can use the kernels without torch.
add_library(transkimmer_cpu_kernels STATIC ${cpu_kernels})
target_include_directories(transkimmer_cpu_kernels PUBLIC csrc/include)
transkimmer_warnings(transkimmer_cpu_kernels)
if(TRANSKIMMER_COMPILES_AVX512BF16)
  target_compile_definitions(transkimmer_cpu_kernels PRIVATE TRANSKIMMER_HAS_AVX512BF16)
endif()

add_library(transkimmer_cpu SHARED csrc/library_cpu.cpp csrc/library_cpu_rows.cpp csrc/library_cpu_fused.cpp)
transkimmer_warnings(transkimmer_cpu)
target_link_libraries(transkimmer_cpu PRIVATE torch_stable transkimmer_cpu_kernels)
install(TARGETS transkimmer_cpu LIBRARY DESTINATION .)
