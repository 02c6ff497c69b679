// The Python module transkimmer_kernels._native: how the native code was built. Operators never go through
// it, because unlike the libraries it belongs to one version of Python.

#include <pybind11/pybind11.h>

#include "build_info.h"  // written by CMake

PYBIND11_MODULE(_native, module) {
  module.doc() = "How the native code of transkimmer was built.";
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        for (const auto& [key, value] : transkimmer::kBuildInfo) info[key] = value;
        return info;
      },
      "Versions, architectures and flags, as strings.");
}
