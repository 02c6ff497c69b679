# The target torch_stable: headers and library of PyTorch's stable ABI (torch/csrc/stable), restricted to what torch 2.10
# had, so that one binary serves every torch from 2.10 on. find_package(Torch) is not used: it looks for the CUDA
# toolkit that torch was built with, and would refuse the mixture of CPU-only torch and nvcc that is supported here.
if(NOT EXISTS "${TRANSKIMMER_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "TRANSKIMMER_TORCH_DIR='${TRANSKIMMER_TORCH_DIR}' has no include/torch/csrc/stable/library.h; "
                      "it must be the folder of an installed torch >= 2.10")
endif()
file(STRINGS "${TRANSKIMMER_TORCH_DIR}/version.py" version_line REGEX "^__version__")
string(REGEX REPLACE ".*['\"](.*)['\"].*" "\\1" TRANSKIMMER_TORCH_VERSION "${version_line}")

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${TRANSKIMMER_TORCH_DIR}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# No rpath: at run time the libtorch_cpu that `import torch` has loaded is used.
set(CMAKE_SKIP_RPATH ON)
target_link_directories(torch_stable INTERFACE "${TRANSKIMMER_TORCH_DIR}/lib")
target_link_libraries(torch_stable INTERFACE torch_cpu)
if(NOT APPLE)
  target_link_options(torch_stable INTERFACE -Wl,-z,defs -Wl,--exclude-libs,ALL)
endif()

# Error messages quote source files; they should not quote the folders of the machine that compiled them.
add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=>"
                    "$<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${TRANSKIMMER_TORCH_DIR}/include/=>")

function(transkimmer_warnings target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra> $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
  if(TRANSKIMMER_WERROR)
    target_compile_options(${target} PRIVATE
      $<$<COMPILE_LANGUAGE:CXX>:-Werror> $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-Xcompiler=-Werror>)
  endif()
endfunction()
