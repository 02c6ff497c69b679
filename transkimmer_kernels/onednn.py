"""Matrix products on the CPU: oneDNN with weights packed once, through the operators PyTorch's own compiler uses.

Packing matters most where skimming leaves few rows: an unpacked product re-lays the whole weight out at every call, a
cost that does not shrink with the tokens. `benchmarks/packing.py` measures it.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# oneDNN compiles a kernel per row count (about 0.5 ms): row counts are rounded up to this, so that they recur.
ROW_MULTIPLE = 8
# Row count the packed layout is chosen for; from 16 to 880 rows it is as fast as a layout of their own (packing.py).
_TYPICAL_ROWS = 256


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch packs weights of `dtype` for oneDNN on this processor."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return bool(ops._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack_weight(weight: Tensor) -> Tensor:
    """A weight [out, in] in oneDNN's own layout, or as it is where that is not to be had; `linear` takes both."""
    if weight.device.type != "cpu" or not can_pack(weight.dtype) or weight.numel() == 0:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _TYPICAL_ROWS)


def round_up_rows(count: int, capacity: int) -> int:
    return min(capacity, -(-count // ROW_MULTIPLE) * ROW_MULTIPLE)


def multiplied_rows(cu_seqlens: Tensor, capacity: int) -> int:
    """How many rows a product computes: the valid ones, and a few behind them that nobody reads."""
    return round_up_rows(int(cu_seqlens[-1]), capacity)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, rows: int) -> Tensor:
    """activation(x[:rows] @ weight^T + bias) as [x.size(0), out]; the rows behind `rows` stay unwritten.

    x: [capacity, in]; weight: [out, in], packed or not; activation: "none" or "gelu" (exact).
    """
    dense = x if rows == x.size(0) else x[:rows]
    if rows and weight.is_mkldnn:
        y = torch.ops.mkldnn._linear_pointwise(dense, weight, bias, activation, [], "none")
    elif weight.is_mkldnn:
        y = x.new_empty((0, weight.size(0)))
    else:
        y = F.linear(dense, weight, bias)
        if activation == "gelu":
            y = F.gelu(y)
    if rows == x.size(0):
        return y
    full = y.new_empty((x.size(0), y.size(1)))
    full[:rows] = y
    return full
