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
  add_test(NAME ${name} COMMAND ${name})
endforeach()
