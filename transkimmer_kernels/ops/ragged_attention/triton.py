"""`ragged_attention` in Triton: launches and shipped configurations. The kernels are in triton_forward.py, backward."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ... import triton_support
from ...library import implement
from ...triton_blocks import multiprocessors
from ...triton_support import DTYPE_NAMES, Specialisation, specialise
from ..checks import require
from .tiling import TUNABLE, Tiling
from .triton_backward import grad_keys_kernel, grad_queries_kernel
from .triton_forward import attention_kernel, importance_kernel

_LOG2_E = 1.4426950408889634


@functools.cache
def _block_constants(heads: int, head_dim: int) -> dict[str, Any]:
    return {"HEADS": heads, "HEAD_DIM": head_dim, "BD": max(16, triton.next_power_of_2(head_dim))}


def _grid(side: str, max_seqlen: int, batch: int, rows: int, heads: int) -> tuple[int, int]:
    """(sequence, tile of `rows` rows) x head."""
    tiles = batch * triton.cdiv(max_seqlen, rows)
    require(
        tiles < 2**31,
        f"max_seqlen_{side}: {max_seqlen} rows in each sequence of a batch of {batch} make {tiles} tiles, and a launch "
        "takes fewer than 2^31; pass a tighter bound, or a part of the batch",
    )
    return tiles, heads


def _strides(*operands: Tensor) -> tuple[int, ...]:
    return tuple(x.stride(0) for x in operands) + tuple(x.stride(1) for x in operands)


@implement("ragged_attention", "triton", available=triton_support.why_not)
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
    capacity_q, heads, head_dim = q.shape
    capacity_k, batch = k.size(0), cu_seqlens_q.numel() - 1
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    tiling, constants = TUNABLE.config(q.device, q.dtype, head_dim), _block_constants(heads, head_dim)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty((heads, capacity_q), dtype=torch.float32)
    block_q, block_k = tiling.aligned
    # No sequence is longer than its list. A bound near 2^31 would wrap around in a kernel.
    max_seqlen_q, max_seqlen_k = min(max_seqlen_q, capacity_q), min(max_seqlen_k, capacity_k)
    # Whole rows of P are then at hand where they are made.
    at_once = return_importance and max_seqlen_q <= block_q and max_seqlen_k <= block_k
    partial = q.new_empty((heads if return_importance else 0, capacity_k), dtype=torch.float32)
    max_seqlen_q = max(max_seqlen_q, 1)  # a sequence of keys alone also has its importance written
    most = max(batch * triton.cdiv(max_seqlen_q, block_q), triton.cdiv(capacity_q, tiling.packed[0])) if batch else 0
    programs = min(most * heads, tiling.programs * multiprocessors(q.device))
    with torch.cuda.device_of(q):
        if programs:
            attention_kernel[(programs,)](
                *(q, k, v, keep, out, lse, partial if at_once else None, cu_seqlens_q, cu_seqlens_k),
                *(batch, max_seqlen_q, *_strides(q, k, v), capacity_q, capacity_k, scale * _LOG2_E),
                **constants,
                **tiling.forward_options(),
            )
        if return_importance and not at_once and batch and max_seqlen_k:
            importance_kernel[_grid("k", max_seqlen_k, batch, tiling.own, heads)](
                *(q, k, keep, lse, partial, cu_seqlens_q, cu_seqlens_k, max_seqlen_k),
                *(*_strides(q, k), capacity_q, capacity_k, scale * _LOG2_E),
                **constants,
                **tiling.backward_options("BN", "BM"),
            )
    return out, lse, partial.sum(0) if return_importance else lse.new_empty(0)


@implement("ragged_attention_backward", "triton", available=triton_support.why_not)
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
    heads, head_dim = q.shape[1:]
    capacity_q, capacity_k, batch = q.size(0), k.size(0), cu_seqlens_q.numel() - 1
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    # A gradient is defined everywhere: 0 beyond the token count.
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    grad_keep = None if keep is None else lse.new_zeros((heads, capacity_k))
    tiling, constants = TUNABLE.config(q.device, q.dtype, head_dim), _block_constants(heads, head_dim)
    strides = _strides(q, k, v)
    max_seqlen_q, max_seqlen_k = min(max_seqlen_q, capacity_q), min(max_seqlen_k, capacity_k)
    with torch.cuda.device_of(q):
        if batch and max_seqlen_q:
            grad_queries_kernel[_grid("q", max_seqlen_q, batch, tiling.own, heads)](
                *(grad_out, q, k, v, keep, out, lse, delta, grad_q, cu_seqlens_q, cu_seqlens_k),
                *(max_seqlen_q, *strides, capacity_q, scale),
                **constants,
                **tiling.backward_options("BM", "BN"),
            )
        if batch and max_seqlen_k:
            grad_keys_kernel[_grid("k", max_seqlen_k, batch, tiling.own, heads)](
                *(grad_out, q, k, v, keep, lse, delta, grad_k, grad_v, grad_keep, cu_seqlens_q, cu_seqlens_k),
                *(max_seqlen_k, *strides, capacity_q, capacity_k, scale),
                **constants,
                **tiling.backward_options("BN", "BM"),
            )
    return grad_q, grad_k, grad_v, lse.new_empty(0) if grad_keep is None else grad_keep.sum(0)


_HEADS = 12


def specialisations() -> Iterator[Specialisation]:
    """Every kernel for every dtype and head size; with weights, where those only add work.

    fp16 is shipped in the configurations of bf16, from which only the type in the instructions differs: one head size
    shows that.
    """
    for dtype in DTYPE_NAMES:
        for head_dim in (32, 64, 128) if dtype != torch.float16 else (64,):
            for number, (tiling, target) in enumerate(TUNABLE.shipped(dtype, head_dim).items()):
                label = f"ragged_attention measured {number}" if number else "ragged_attention"
                yield from _specialisations(label, dtype, head_dim, tiling, target)


def _specialisations(
    label: str, dtype: torch.dtype, head_dim: int, tiling: Tiling, target: str | None
) -> Iterator[Specialisation]:
    kind, pointers = DTYPE_NAMES[dtype], ("p_keep", "p_lse", "p_importance", "p_delta", "p_grad_keep")
    types = dict.fromkeys(pointers, "*fp32") | {"p_cu_seqlens_q": "*i32", "p_cu_seqlens_k": "*i32", "scale": "fp32"}
    forward = tiling.forward_options()
    owns_keys, owns_queries = tiling.backward_options("BN", "BM"), tiling.backward_options("BM", "BN")
    for name, kernel, options in (
        ("forward", attention_kernel, {**forward, "p_keep": None, "p_importance": None}),
        ("forward weights", attention_kernel, {**forward, "p_importance": None}),
        ("forward weights importance", attention_kernel, forward),
        ("importance weights", importance_kernel, owns_keys),
        ("grad_queries weights", grad_queries_kernel, owns_queries),
        ("grad_keys weights", grad_keys_kernel, owns_keys),
    ):
        keywords = {**_block_constants(_HEADS, head_dim), **options}
        full_name, matmul = f"{label} {name} {head_dim} {kind}", dtype != torch.float32
        yield specialise(full_name, kernel, kind, keywords, types, matmul=matmul, target=target)
