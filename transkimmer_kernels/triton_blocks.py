"""What several Triton backends share: device functions, and the size of the device they run on."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from . import triton_support

# Few enough that the tests' small inputs make persistent programs walk.
_INTERPRETED_MULTIPROCESSORS = 8
_INTERPRETED = tl.constexpr(triton_support.interpreted())


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has that kernels run on; a small number in the interpreter."""
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
def places(p_slots, o_row, m_row):
    """int64: what stands in the slots `o_row`; without slots, `o_row` itself."""
    return o_row.to(tl.int64) if p_slots is None else tl.load(p_slots + o_row, mask=m_row, other=0).to(tl.int64)


@triton.jit
def multiply_add(b_a, b_b, b_acc):
    """acc + a @ b in fp32, without TF32."""
    if _INTERPRETED:  # whose `dot` would multiply the bit patterns of bf16; in fp32 their product is the same
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc, input_precision="ieee")


@triton.jit
def exact_gelu(b_x):
    return 0.5 * b_x * (1.0 + tl.erf(b_x * 0.7071067811865476))


@triton.jit
def fast_gelu(b_x):
    """x Phi(x), with erfc by Abramowitz & Stegun 7.1.26, whose error of 1.5e-7 is lost in 16 bits.

    A third of the instructions of `erf`, which in a large tile would take as long as the product itself.
    """
    b_abs = tl.abs(b_x)
    b_t = 1.0 / (1.0 + 0.2316419 * b_abs)
    b_half = (
        (((0.5307027145 * b_t - 0.7265760135) * b_t + 0.7107068705) * b_t - 0.142248368) * b_t + 0.127414796
    ) * b_t
    return tl.maximum(b_x, 0.0) - b_abs * b_half * tl.exp2(-0.7213475204444817 * b_x * b_x)


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
