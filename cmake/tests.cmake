# C++ self-checks: every csrc/tests/*.cpp is one program, which fails by a non-zero exit status. Built on demand only:
#   cmake --build build/cmake --target native_tests && ctest --test-dir build/cmake
enable_testing()
add_custom_target(native_tests)
file(GLOB test_sources CONFIGURE_DEPENDS csrc/tests/*.cpp)
find_package(Threads REQUIRED)

# csrc/tests/cuda_emulation stands in for the CUDA headers and for transkimmer/mma.cuh, so that kernels can be stepped
# through without a device; it comes first.
function(transkimmer_emulates_cuda target)
  target_include_directories(${target} BEFORE PRIVATE csrc/tests/cuda_emulation csrc/tests csrc csrc/include)
  transkimmer_warnings(${target})
  # #pragma unroll; and kernels read memory in wider words than it was written in.
  target_compile_options(${target} PRIVATE -Wno-unknown-pragmas -fno-strict-aliasing)
  add_dependencies(native_tests ${target})
endfunction()

# The same kernels for tests in Python, which hand them tensors.
file(GLOB emulated_sources CONFIGURE_DEPENDS csrc/tests/emulated/*.cpp)
add_library(emulated_kernels SHARED EXCLUDE_FROM_ALL ${emulated_sources})
transkimmer_emulates_cuda(emulated_kernels)

foreach(source ${test_sources})
  get_filename_component(name "${source}" NAME_WE)
  add_executable(${name} EXCLUDE_FROM_ALL "${source}")
  target_link_libraries(${name} PRIVATE transkimmer_cpu_kernels Threads::Threads)
  transkimmer_emulates_cuda(${name})
  if(name STREQUAL cpu_kernels_test)  # once per instruction set; exit status 77: this processor lacks it, and says so
    foreach(isa ${TRANSKIMMER_ISAS})
      add_test(NAME ${name}_${isa} COMMAND ${name})
      set_tests_properties(${name}_${isa} PROPERTIES ENVIRONMENT TRANSKIMMER_CPU_ISA=${isa})
      if(NOT isa STREQUAL generic)
        set_tests_properties(${name}_${isa} PROPERTIES SKIP_RETURN_CODE 77)
      endif()
    endforeach()
  elseif(name STREQUAL attention_fill_test)
    add_test(NAME ${name} COMMAND ${name} "${CMAKE_SOURCE_DIR}/python/transkimmer/bench/lengths.json")
  else()
    add_test(NAME ${name} COMMAND ${name})
  endif()
endforeach()
