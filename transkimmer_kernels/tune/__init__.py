"""Measures the configurations of the Triton kernels on this machine's GPU: `python -m transkimmer_kernels.tune`."""
