"""Row movement on the CPU: gathering is PyTorch's own, since a native loop was no faster.

Scattering is a native loop that writes every row of the result once, where zeros and `index_copy_` write the listed
ones twice. Stored timings (`benchmarks/results/cpu/kernels-*.json`): 1.5 to 5.7 times as fast with everything in the
cache; from memory 1.0 to 1.7 times, but 0.87 in one case of six, fp32 with 133 rows listed. It stays because the
others outweigh that one, and a border between them has not been measured.
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
