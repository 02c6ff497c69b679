"""Microbenchmarks of the operators on a GPU; `make gpu-check` runs them.

    python -m pytest benchmarks/kernels --benchmark-json=FILE

Without a GPU the same code runs once, on tiny inputs and whichever backends serve a CPU, and no time is taken: that
shows that the benchmarks work, and nothing else.
"""
