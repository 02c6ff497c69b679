"""Measured configurations of the Triton kernels, a JSON file per device; `transkimmer_kernels.tuning` reads them.

There is a file for every device that `python -m transkimmer_kernels.tune` has been run on, and for no other.
"""
