from __future__ import annotations

from torch import Tensor

from ...library import implement


@implement("gather_rows", "reference")
def gather_rows(x: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
    count = int(cu_seqlens[-1])
    y = x.new_zeros((slots.numel(), *x.shape[1:]))
    y[:count] = x[slots[:count].long()]
    return y


@implement("scatter_rows", "reference")
def scatter_rows(x: Tensor, slots: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    count = int(cu_seqlens[-1])
    y = x.new_zeros((num_rows, *x.shape[1:]))
    y[slots[:count].long()] = x[:count]
    return y
