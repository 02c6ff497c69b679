// A line of text in every kernel library, by which Python knows the file before it loads it
// (transkimmer_kernels/library_file.py).
#pragma once

// Changes whenever the name or the signature of something registered does; the same number stands in Python.
#define TRANSKIMMER_INTERFACE "1"

#if defined(_WIN32)
#define TRANSKIMMER_EXPORT __declspec(dllexport)
#else
#define TRANSKIMMER_EXPORT __attribute__((visibility("default")))
#endif

// Exported, so that no linker drops it.
#define TRANSKIMMER_DESCRIBE_LIBRARY(kind, architectures)                                                 \
  extern "C" TRANSKIMMER_EXPORT const char transkimmer_##kind##_library[];                                \
  const char transkimmer_##kind##_library[] =                                                             \
      "transkimmer kernels: " #kind "; interface " TRANSKIMMER_INTERFACE "; architectures " architectures \
      ";"
