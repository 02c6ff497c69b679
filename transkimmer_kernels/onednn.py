"""Matrix products by oneDNN on weights packed once, through the operators PyTorch's own compiler uses."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# oneDNN compiles a kernel per row count (about 0.5 ms): row counts are rounded up to this, so that they recur. The
# native products round up to the same (csrc/cpu_products.h).
ROW_MULTIPLE = 8
# Row count the packed layout is chosen for; from 16 to 880 rows it is as fast as a layout of their own (packing.py).
_TYPICAL_ROWS = 256


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch packs weights of `dtype`, and multiplies with them, on this processor."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_reorder_linear_weight"):
        return False
    if not torch.ops.transkimmer_cpu.takes_packed_weights():
        return False
    if dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack_weight(weight: Tensor) -> Tensor:
    """A contiguous weight [out, in] in oneDNN's own layout, where `can_pack`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)


def round_up_rows(count: int, capacity: int) -> int:
    return min(capacity, -(-count // ROW_MULTIPLE) * ROW_MULTIPLE)
