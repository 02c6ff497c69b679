"""An encoder layer put together from the single operators of any backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...onednn import round_up_rows
from ...registry import KernelSet


def compose_layer_(
    kernels: KernelSet,
    hidden: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm1_eps: float,
    ffn_in_weight: Tensor,
    ffn_in_bias: Tensor | None,
    ffn_out_weight: Tensor,
    ffn_out_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    norm2_eps: float,
    activation: str | Callable[[Tensor], Tensor],
) -> None:
    """`encoder_layer_` by the operators of `kernels`; `activation` may also be any elementwise function."""
    width, first_only = hidden.size(1), query_weight is not None
    head_dim = width // num_heads
    slots = _trim(slots, cu_seqlens, kernels)
    projected = kernels.ragged_linear(hidden, qkv_weight, qkv_bias, cu_seqlens, slots, "none")
    *query, k, v = projected.view(-1, 2 if first_only else 3, num_heads, head_dim).unbind(1)  # [capacity, H, D] each
    rows, cu_rows, longest = slots, cu_seqlens, max_seqlen  # what is updated
    if first_only:
        rows, cu_rows = first_tokens(slots, cu_seqlens, kernels)
        longest = 1
        q = kernels.ragged_linear(hidden, query_weight, query_bias, cu_rows, rows, "none")
        query = [q.view(-1, num_heads, head_dim)]
    context, _, _ = kernels.ragged_attention(
        query[0], k, v, cu_rows, cu_seqlens, longest, max_seqlen, head_dim**-0.5, None, False
    )
    x = kernels.ragged_linear_norm(
        context.view(-1, width), out_weight, out_bias, hidden, rows, norm1_weight, norm1_bias, norm1_eps, cu_rows
    )
    fused = isinstance(activation, str)
    inner = kernels.ragged_linear(x, ffn_in_weight, ffn_in_bias, cu_rows, None, activation if fused else "none")
    if not isinstance(activation, str):
        inner = activation(inner)
    kernels.ragged_linear_norm_(
        hidden, rows, inner, ffn_out_weight, ffn_out_bias, x, norm2_weight, norm2_bias, norm2_eps, cu_rows
    )


def _trim(slots: Tensor, cu_seqlens: Tensor, kernels: KernelSet) -> Tensor:
    """On a CPU the token count is at hand: the list, and so every buffer made from it, shrinks to it.

    On a device the list keeps its capacity, because the count is not read back; and for Triton kernels, which run in
    the interpreter then as they would on a device.
    """
    on_host = slots.device.type == "cpu" and kernels.serves["ragged_linear"] != "triton"
    if not on_host or torch.compiler.is_compiling():
        return slots
    return slots[: round_up_rows(int(cu_seqlens[-1]), slots.numel())]


def first_tokens(slots: Tensor, cu_seqlens: Tensor, kernels: KernelSet) -> tuple[Tensor, Tensor]:
    """(slots int32 [at most batch], cu_seqlens) of each sequence's first listed token; an empty sequence has none."""
    none_kept = torch.zeros_like(slots, dtype=torch.bool)
    first, cu_first = kernels.compact(none_kept, slots, cu_seqlens, True)
    return first[: cu_seqlens.numel() - 1], cu_first
