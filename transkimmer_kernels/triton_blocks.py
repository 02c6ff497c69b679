"""What several Triton backends share: a search in the offsets, LayerNorm, and the size of the device they run on."""

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


@triton.jit
def centre(b_x, m_col, eps, SIZE: tl.constexpr):
    """Rows of SIZE numbers in fp32 [R, N], zeros in columns behind them: around their mean [R, N], the mean [R] and
    1 / standard deviation [R].

    The rows are in registers, so that the variance is taken around the mean: with BERT's eps of 1e-12 the difference of
    two large sums would be noise.
    """
    b_mean = tl.sum(b_x, 1) / SIZE
    b_centred = tl.where(m_col[None, :], b_x - b_mean[:, None], 0.0)
    return b_centred, b_mean, tl.rsqrt(tl.sum(b_centred * b_centred, 1) / SIZE + eps)
