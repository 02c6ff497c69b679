"""Row movement on the CPU: gathering is PyTorch's own, since a native loop was no faster.

Scattering is a native loop that writes every row of the result once, where zeros and `index_copy_` write the listed
ones twice; `benchmarks/cpu_kernels.py` times both. Where it was timed it was faster with everything in the cache, and
from memory in all cases but one; a border between them has not been measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...library import implement, implement_natively, needs_library


@implement("gather_rows", "cpu", available=needs_library("cpu"))
def gather_rows(x: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
    count = int(cu_seqlens[-1])
    y = x.new_empty((slots.numel(), *x.shape[1:]))
    torch.index_select(x, 0, slots[:count], out=y[:count])
    return y


implement_natively("scatter_rows", "cpu")
