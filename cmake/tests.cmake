# C++ self-checks: every csrc/tests/*.cpp is one program, which fails by a non-zero exit status. Built on demand only:
#   cmake --build build/cmake --target native_tests && ctest --test-dir build/cmake
enable_testing()
add_custom_target(native_tests)
file(GLOB test_sources CONFIGURE_DEPENDS csrc/tests/*.cpp)
find_package(Threads REQUIRED)
foreach(source ${test_sources})
  get_filename_component(name "${source}" NAME_WE)
  add_executable(${name} EXCLUDE_FROM_ALL "${source}")
  target_include_directories(${name} PRIVATE csrc csrc/include)
  # csrc/tests/cuda_emulation stands in for the CUDA headers, so that kernels can be stepped through without a device.
  target_include_directories(${name} SYSTEM PRIVATE csrc/tests/cuda_emulation)
  target_link_libraries(${name} PRIVATE transkimmer_cpu_kernels Threads::Threads)
  transkimmer_warnings(${name})
  target_compile_options(${name} PRIVATE -Wno-unknown-pragmas)  # #pragma unroll
  add_dependencies(native_tests ${name})
  if(name STREQUAL cpu_kernels_test)  # once per instruction set; exit status 77: this processor lacks it
    foreach(isa generic avx2 avx512)
      add_test(NAME ${name}_${isa} COMMAND ${name})
      set_tests_properties(${name}_${isa} PROPERTIES ENVIRONMENT TRANSKIMMER_CPU_ISA=${isa} SKIP_RETURN_CODE 77)
    endforeach()
  else()
    add_test(NAME ${name} COMMAND ${name})
  endif()
endforeach()
