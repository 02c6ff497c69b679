"""`embed_tokens` in Triton: a program, one warp, adds up a token's three rows and normalises the sum in registers.

Reads three rows of a table per token, of which those of positions and types lie in the cache, and writes one;
as operators of PyTorch the same are six kernels, which write and read the sum three times more. The row is in
registers, so the variance is taken around the mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import triton_support
from ...library import implement
from ...triton_support import DTYPE_NAMES, Specialisation, specialise


@triton.jit
def _row_of(p_table, row, size, o_col, m_col, SIZE: tl.constexpr):
    """table[row] [BLOCK] in fp32; NaN where the table has no such row."""
    readable = tl.where((row >= 0) & (row < size), SIZE, 0)  # columns; a scalar condition is no mask to the interpreter
    b_x = tl.load(p_table + row.to(tl.int64) * SIZE + o_col, mask=o_col < readable, other=float("nan"))
    return tl.where(m_col, b_x.to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["length", "positions_period", "types_period", "words", "positions", "types"])
def embed_kernel(
    p_ids,  # int [tokens]
    p_position_ids,  # int [positions_period], or None: a token's place in its sequence
    p_type_ids,  # int [types_period], or None: 0
    p_word,  # [words, SIZE]
    p_position,  # [positions, SIZE]
    p_type,  # [types, SIZE] or None
    p_weight,  # [SIZE]
    p_bias,  # [SIZE]
    p_out,  # [tokens, SIZE], written
    length,
    positions_period,  # ids that are given for one sequence serve all
    types_period,
    words,
    positions,
    types,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i] = LayerNorm(word[ids[i]] + position[position_ids[i]] + type[type_ids[i]]) * weight + bias; program i."""
    token = tl.program_id(0)
    o_col = tl.arange(0, BLOCK)
    m_col = o_col < SIZE
    b_x = _row_of(p_word, tl.load(p_ids + token), words, o_col, m_col, SIZE)  # [BLOCK]
    place = token % length if p_position_ids is None else tl.load(p_position_ids + token % positions_period)
    b_x += _row_of(p_position, place, positions, o_col, m_col, SIZE)
    if p_type is not None:
        kind = token * 0 if p_type_ids is None else tl.load(p_type_ids + token % types_period)
        b_x += _row_of(p_type, kind, types, o_col, m_col, SIZE)
    b_x = tl.where(m_col, b_x - tl.sum(b_x, 0) / SIZE, 0.0)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, 0) / SIZE + eps)
    b_weight = tl.load(p_weight + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_y = b_x * b_scale * b_weight + b_bias
    tl.store(p_out + token.to(tl.int64) * SIZE + o_col, b_y.to(p_out.dtype.element_ty), mask=m_col)


def _shape(size: int) -> dict[str, int]:
    """Up to 1024 columns one warp holds a row."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(max(1, block // 1024), 16)}


@implement("embed_tokens", "triton", available=triton_support.why_not)
def embed_tokens(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor,
    type_weight: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    size = word_weight.size(1)
    out = word_weight.new_empty((*input_ids.shape, size))
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(word_weight):
        embed_kernel[(input_ids.numel(),)](
            input_ids.contiguous(),
            None if position_ids is None else position_ids.contiguous(),
            None if token_type_ids is None else token_type_ids.contiguous(),
            word_weight.contiguous(),
            position_weight.contiguous(),
            None if type_weight is None else type_weight.contiguous(),
            norm_weight.contiguous(),
            norm_bias.contiguous(),
            out,
            input_ids.size(1),
            1 if position_ids is None else position_ids.numel(),
            1 if token_type_ids is None else token_type_ids.numel(),
            word_weight.size(0),
            position_weight.size(0),
            0 if type_weight is None else type_weight.size(0),
            eps,
            SIZE=size,
            **_shape(size),
        )
    return out


def specialisations() -> Iterator[Specialisation]:
    """BERT (types given and not), ALBERT, RoBERTa (positions given) and DistilBERT (no types), in every dtype."""
    types = dict.fromkeys(("p_ids", "p_position_ids", "p_type_ids"), "*i64") | {"eps": "fp32"}
    for kind in DTYPE_NAMES.values():
        for name, size, absent in (
            ("bert", 768, ("p_position_ids", "p_type_ids")),
            ("bert with types", 384, ("p_position_ids",)),
            ("albert", 128, ("p_position_ids", "p_type_ids")),
            ("roberta", 1024, ("p_type_ids",)),
            ("distilbert", 768, ("p_position_ids", "p_type_ids", "p_type")),
        ):
            keywords = {**dict.fromkeys(absent), "SIZE": size, **_shape(size)}
            yield specialise(f"embed_tokens {name} {size} {kind}", embed_kernel, kind, keywords, types)
