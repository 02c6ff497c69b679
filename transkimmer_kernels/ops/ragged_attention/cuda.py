"""`ragged_attention` on CUDA: a C++ kernel where all sequences are short, Triton's where they may be longer.

Lengths stay on the device, so what decides is the bound that the host knows. The backward is Triton's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...library import OPERATORS, implement, needs_kernel

# As in csrc/include/transkimmer/attention_plan.h and csrc/cuda/short_attention.cu.
LONGEST = 128
HEAD_DIMS = (32, 64)
DTYPES = (torch.float16, torch.bfloat16)

_available = needs_kernel("transkimmer_cuda::short_attention", "ragged_attention", f"more than {LONGEST} tokens")


def is_short(q: Tensor, k: Tensor, v: Tensor, max_seqlen_q: int, max_seqlen_k: int) -> bool:
    """Whether the C++ kernel serves these arguments, which are those of the operator."""
    return (
        max(max_seqlen_q, max_seqlen_k) <= LONGEST
        and q.size(2) in HEAD_DIMS
        and q.dtype in DTYPES
        and all(_is_aligned(x) for x in (q, k, v))
    )


def _is_aligned(x: Tensor) -> bool:
    """Whether every row of every head begins at a multiple of 16 bytes, as loads of that size need."""
    return x.stride(2) == 1 and x.stride(0) % 8 == x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0


@implement("ragged_attention", "cuda", available=_available)
def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    keep: Tensor | None,
    return_importance: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not is_short(q, k, v, max_seqlen_q, max_seqlen_k):
        run = OPERATORS["ragged_attention"].overload("triton")
        return run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, keep, return_importance)
    # The kernel takes a plain list; a slice of offsets need not be contiguous.
    offsets = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    short_attention = torch.ops.transkimmer_cuda.short_attention
    return short_attention(q, k, v, *offsets, max_seqlen_k, scale, keep, return_importance)


@implement(
    "ragged_attention_backward",
    "cuda",
    available=needs_kernel("transkimmer_cuda::short_attention", "ragged_attention_backward", "the backward"),
)
def ragged_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = OPERATORS["ragged_attention_backward"].overload("triton")
    tensors = (grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)
    return run(*tensors, max_seqlen_q, max_seqlen_k, scale, keep)
