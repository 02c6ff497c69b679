from __future__ import annotations

import torch
from torch import Tensor

from ...library import implement, implement_natively, needs_library


@implement("gather_rows", "cpu", available=needs_library("cpu"))
def gather_rows(x: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
    """PyTorch's own: a native loop was no faster (benchmarks/cpu_kernels.py measured x0.68 to x1.02)."""
    count = int(cu_seqlens[-1])
    y = x.new_empty((slots.numel(), *x.shape[1:]))
    torch.index_select(x, 0, slots[:count], out=y[:count])
    return y


implement_natively("scatter_rows", "cpu")
