"""`encoder_layer_`: a whole post-LN encoder layer on the surviving tokens, at inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...library import define
from ...registry import select
from ..checks import FLOATS, check_max_seqlen, check_slots, check_tensor, check_weight, refuse_gradients, require
from ..counting import pair_count, product_flops, row_count, sequence_count
from ..ragged_linear import ACTIVATIONS


def _fake(hidden: Tensor, *rest: Any) -> None:
    return None


def _flops(
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
    *rest: Any,
) -> int:
    rows = row_count(cu_seqlens, slots.numel())
    total = product_flops(rows, qkv_weight)
    if query_weight is None:
        updated, pairs = rows, pair_count(cu_seqlens, cu_seqlens, slots.numel(), max_seqlen)
    else:
        updated, pairs = sequence_count(cu_seqlens), rows
        total += product_flops(updated, query_weight)
    total += sum(product_flops(updated, weight) for weight in (out_weight, ffn_in_weight, ffn_out_weight))
    return total + 2 * 2 * pairs * hidden.size(1)


define(
    "encoder_layer_",
    "(Tensor(a!) hidden, Tensor slots, Tensor cu_seqlens, SymInt max_seqlen, int num_heads, Tensor qkv_weight, "
    "Tensor? qkv_bias, Tensor? query_weight, Tensor? query_bias, Tensor out_weight, Tensor? out_bias, "
    "Tensor norm1_weight, Tensor norm1_bias, float norm1_eps, Tensor ffn_in_weight, Tensor? ffn_in_bias, "
    "Tensor ffn_out_weight, Tensor? ffn_out_bias, Tensor norm2_weight, Tensor norm2_bias, float norm2_eps, "
    "str activation) -> ()",
    fake=_fake,
    flops=_flops,
)


def encoder_layer_(
    hidden: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm1_eps: float = 1e-12,
    ffn_in_weight: Tensor,
    ffn_in_bias: Tensor | None,
    ffn_out_weight: Tensor,
    ffn_out_bias: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    norm2_eps: float = 1e-12,
    activation: str = "gelu",
    kernels: str = "auto",
) -> Tensor:
    """Attention and FFN of a BERT layer for the listed rows of `hidden`, in place; other rows stay as they are.

    With `query_weight` only the first token of each sequence is updated, with all listed tokens as its keys: exact
    for the last layer under a head that reads nothing else. Not differentiable.

    Args:
        hidden: [rows, d], fp32, bf16 or fp16 (fp64 on `reference`), contiguous, written.
        slots: int32 [capacity], distinct; cu_seqlens: int32 [batch + 1].
        max_seqlen: upper bound of a sequence's length.
        num_heads: heads; the softmax scale is (d / num_heads) ** -0.5.
        qkv_weight: [3d, d], query, key and value one above the other; with `query_weight` [2d, d], key and value.
        query_weight: [d, d] or None; query_bias: [d] or None.
        out_weight: [d, d]. ffn_in_weight: [ff, d]. ffn_out_weight: [d, ff]. All may be in a backend's packed form.
        qkv_bias, out_bias, ffn_in_bias, ffn_out_bias: a vector as long as its matrix has rows, or None.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: [d].
        norm1_eps, norm2_eps: of the LayerNorms behind attention and FFN.
        activation: "none" or "gelu" (exact).
        kernels: backend, see `registry`.

    Returns:
        `hidden`.
    """
    check_tensor("hidden", hidden, dim=2, dtype=FLOATS)
    check_tensor("slots", slots, device=hidden.device)
    check_slots("slots", slots, cu_seqlens, hidden.size(0))
    check_max_seqlen("max_seqlen", max_seqlen, cu_seqlens)
    width = hidden.size(1)
    require(activation in ACTIVATIONS, f"activation: must be one of {ACTIVATIONS}, got {activation!r}")
    projections = 3 if query_weight is None else 2
    inner = ffn_in_weight.size(0) if ffn_in_weight.dim() >= 2 else None
    matrices = {
        "qkv": (qkv_weight, qkv_bias, projections * width, width),
        "query": (query_weight, query_bias, width, width),
        "out": (out_weight, out_bias, width, width),
        "ffn_in": (ffn_in_weight, ffn_in_bias, inner, width),
        "ffn_out": (ffn_out_weight, ffn_out_bias, width, inner),
    }
    for name, (weight, bias, rows, columns) in matrices.items():
        if weight is not None:
            check_weight(f"{name}_weight", weight, hidden, (rows, columns), "encoder_layer_", kernels)
        require(bias is None or weight is not None, f"{name}_bias: needs {name}_weight, which is None")
        if bias is not None:
            check_tensor(f"{name}_bias", bias, dtype=hidden.dtype, device=hidden.device, shape=(rows,))
    norms = {"norm1_weight": norm1_weight, "norm1_bias": norm1_bias}
    norms |= {"norm2_weight": norm2_weight, "norm2_bias": norm2_bias}
    for name, vector in norms.items():
        check_tensor(name, vector, dtype=hidden.dtype, device=hidden.device, shape=(width,))
    require(hidden.is_contiguous(), f"hidden: is written in place and must be contiguous, got {hidden.stride()}")
    require(
        num_heads > 0 and width % num_heads == 0,
        f"num_heads: must divide the width of hidden, {width}, got {num_heads}",
    )
    tensors = (hidden, *(t for m in matrices.values() for t in m[:2]), *norms.values())
    refuse_gradients("encoder_layer_", "train on the single operators", *tensors)
    select("encoder_layer_", kernels, hidden.device, hidden.dtype)(
        hidden,
        slots.contiguous(),
        cu_seqlens.contiguous(),
        max_seqlen,
        num_heads,
        qkv_weight,
        qkv_bias,
        query_weight,
        query_bias,
        out_weight,
        out_bias,
        norm1_weight,
        norm1_bias,
        norm1_eps,
        ffn_in_weight,
        ffn_in_bias,
        ffn_out_weight,
        ffn_out_bias,
        norm2_weight,
        norm2_bias,
        norm2_eps,
        activation,
    )
    torch.autograd.graph.increment_version(hidden)  # autograd knows of a write by an operator of ours only so
    return hidden
