# The CUDA library. It is built against whatever torch is there, CPU-only ones included, and loaded where torch has CUDA.

include(cmake/cuda_architectures.cmake)
transkimmer_cuda_architectures(CMAKE_CUDA_ARCHITECTURES "${TRANSKIMMER_NVCC}")
message(STATUS "transkimmer: CUDA library for ${CMAKE_CUDA_ARCHITECTURES}")
set(CMAKE_CUDA_COMPILER "${TRANSKIMMER_NVCC}")
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)  # CMake 3.24 knows no newer one for nvcc
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")

# Stands in for libtorch_cuda.so at link time, which a CPU-only torch lacks. The library then names the real one as
# needed, so that loading it finds the symbol, or says that this torch has no libtorch_cuda.so; and every other undefined
# symbol is still an error when linking.
add_library(torch_cuda_stub SHARED cmake/torch_cuda_stub.cpp)
set_target_properties(torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda CXX_VISIBILITY_PRESET default
                      LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stub")

file(GLOB cuda_kernels CONFIGURE_DEPENDS csrc/cuda/*.cu)
add_library(transkimmer_cuda SHARED csrc/library_cuda.cpp csrc/library_cuda_attention.cpp csrc/library_cuda_skim.cpp
            ${cuda_kernels})
target_include_directories(transkimmer_cuda PRIVATE csrc csrc/include)
target_include_directories(transkimmer_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_definitions(transkimmer_cuda PRIVATE USE_CUDA)
list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
set_source_files_properties(csrc/library_cuda.cpp PROPERTIES
                            COMPILE_DEFINITIONS "TRANSKIMMER_CUDA_ARCHITECTURES=\"${architectures}\"")
target_compile_options(transkimmer_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xfatbin=-compress-all>)
transkimmer_warnings(transkimmer_cuda)
target_link_libraries(transkimmer_cuda PRIVATE torch_stable torch_cuda_stub)
install(TARGETS transkimmer_cuda LIBRARY DESTINATION .)
