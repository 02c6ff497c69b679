"""`embed_tokens`: what stands before the first layer, word + position + type and their LayerNorm, in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...library import define
from ...registry import select
from ..checks import FLOATS, check_rows, check_tensor, refuse_gradients, require

_IDS = (torch.int64, torch.int32)


def _fake(input_ids: Tensor, position_ids: Tensor | None, token_type_ids: Tensor | None, *rest: Any) -> Tensor:
    word_weight: Tensor = rest[0]
    return word_weight.new_empty((*input_ids.shape, word_weight.size(1)))


define(
    "embed_tokens",
    "(Tensor input_ids, Tensor? position_ids, Tensor? token_type_ids, Tensor word_weight, Tensor position_weight, "
    "Tensor? type_weight, Tensor norm_weight, Tensor norm_bias, float eps) -> Tensor",
    fake=_fake,
)


def embed_tokens(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor,
    type_weight: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-12,
    kernels: str = "auto",
) -> Tensor:
    """`LayerNorm(word[input_ids] + position[position_ids] + type[token_type_ids])` (BERT, Sec. 3), for inference.

    Args:
        input_ids: int64 or int32 [batch, seq].
        position_ids: int64 or int32 [batch, seq], or [1, seq] for every sequence; None: 0, 1, ... seq - 1.
        token_type_ids: likewise; None: type 0.
        word_weight: [vocabulary, d]; position_weight: [positions, d]; type_weight: [types, d], or None where the model
            knows no types. fp32, bf16 or fp16, the same in all (fp64 on `reference`). Sums and LayerNorm are fp32; on
            `reference`, as in PyTorch, sums are in the weights' dtype.
        norm_weight, norm_bias: [d].
        eps: of the LayerNorm.
        kernels: backend, see `registry`.

    Returns:
        [batch, seq, d] in the weights' dtype. On a GPU, where ids are not looked at beforehand, the Triton backend
        leaves NaN in the row of an id that is out of range. Not differentiable.
    """
    check_tensor("input_ids", input_ids, dim=2, dtype=_IDS)
    device = input_ids.device
    check_tensor("word_weight", word_weight, dim=2, dtype=FLOATS, device=device)
    width, dtype = word_weight.size(1), word_weight.dtype
    check_tensor("position_weight", position_weight, dtype=dtype, device=device, shape=(None, width))
    check_tensor("norm_weight", norm_weight, dtype=dtype, device=device, shape=(width,))
    check_tensor("norm_bias", norm_bias, dtype=dtype, device=device, shape=(width,))
    if type_weight is not None:
        check_tensor("type_weight", type_weight, dtype=dtype, device=device, shape=(None, width))
    require(token_type_ids is None or type_weight is not None, "token_type_ids: needs type_weight, which is None")
    require(type_weight is None or type_weight.size(0) > 0, "type_weight: expected at least one type, got none")
    check_rows("input_ids", input_ids, word_weight.size(0))
    if position_ids is None:
        seq, positions = input_ids.size(1), position_weight.size(0)
        require(seq <= positions, f"input_ids: {seq} tokens a sequence, but position_weight has {positions} positions")
    for name, ids, table in (
        ("position_ids", position_ids, position_weight),
        ("token_type_ids", token_type_ids, type_weight),
    ):
        if ids is not None and table is not None:
            check_tensor(name, ids, dim=2, dtype=_IDS, device=device, shape=(None, input_ids.size(1)))
            sizes = f"1 or {input_ids.size(0)}"
            require(ids.size(0) in (1, input_ids.size(0)), f"{name}: expected {sizes} rows, got {list(ids.shape)}")
            check_rows(name, ids, table.size(0))
    weights = (word_weight, position_weight, type_weight, norm_weight, norm_bias)
    refuse_gradients("embed_tokens", "use PyTorch's embeddings and LayerNorm", *weights)
    run = select("embed_tokens", kernels, device, dtype)
    given = (input_ids, position_ids, token_type_ids)
    return run(*given, *weights, eps)
