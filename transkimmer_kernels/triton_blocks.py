"""What several Triton backends share: a search in the offsets, and the size of the device they run on."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import triton_support

# Few enough that the tests' small inputs make persistent programs walk.
_INTERPRETED_MULTIPROCESSORS = 8


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the device that kernels run on; a small number in the interpreter."""
    if device.type != "cuda" or triton_support.interpreted():
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def lower_bound(p_cu_seqlens, batch, value):
    """How many of the batch + 1 offsets are below each element of the block `value`: a bisection in step."""
    low = tl.full(value.shape, 0, tl.int32)
    span = batch + 1  # the answer lies between low and low + span
    while span > 1:
        half = span // 2
        low += tl.where(tl.load(p_cu_seqlens + low + half - 1) < value, half, 0)
        span -= half
    return low + (tl.load(p_cu_seqlens + low) < value).to(tl.int32)
