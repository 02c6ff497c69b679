"""A post-LN encoder in plain PyTorch on padded tensors: skimming as a mask, renormalised, with forwarded rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transkimmer_kernels.runtime import LayerWeights


def random_layer(width: int, ff: int, activation: Any, dtype: torch.dtype, device: str) -> LayerWeights:
    def matrix(out: int, size: int) -> Tensor:
        return (torch.randn(out, size) * size**-0.5).to(device, dtype)

    def vector(size: int, shift: float = 0.0) -> Tensor:
        return (torch.randn(size) * 0.2 + shift).to(device, dtype)

    qkv_weight, qkv_bias = matrix(3 * width, width), vector(3 * width)
    return LayerWeights(
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        query_weight=None,
        query_bias=None,
        out_weight=matrix(width, width),
        out_bias=vector(width),
        norm1_weight=vector(width, 1.0),
        norm1_bias=vector(width),
        norm1_eps=1e-12,
        ffn_in_weight=matrix(ff, width),
        ffn_in_bias=vector(ff),
        ffn_out_weight=matrix(width, ff),
        ffn_out_bias=vector(width),
        norm2_weight=vector(width, 1.0),
        norm2_bias=vector(width),
        norm2_eps=1e-12,
        activation=activation,
    )


def first_token_only(layer: LayerWeights) -> LayerWeights:
    """The same layer, which updates the first token of each sequence only."""
    assert layer.qkv_bias is not None
    width = layer.out_weight.size(0)
    query, key_value = layer.qkv_weight.split([width, 2 * width])
    query_bias, key_value_bias = layer.qkv_bias.split([width, 2 * width])
    return dataclasses.replace(
        layer, qkv_weight=key_value, qkv_bias=key_value_bias, query_weight=query, query_bias=query_bias
    )


def cast_layer(layer: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    floats = {name: x.to(dtype) for name, x in vars(layer).items() if isinstance(x, Tensor)}
    return dataclasses.replace(layer, **floats)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B, H, S, D]


def dense_encoder(
    hidden: Tensor, alive_per_layer: Sequence[Tensor], layers: Sequence[LayerWeights], num_heads: int
) -> Tensor:
    """hidden [B, S, d]; alive_per_layer: bool [B, S] each, the tokens a layer works on. Other rows keep their state."""
    for layer, alive in zip(layers, alive_per_layer, strict=True):
        q, k, v = (_heads(x, num_heads) for x in F.linear(hidden, layer.qkv_weight, layer.qkv_bias).chunk(3, -1))
        scores = q @ k.transpose(2, 3) * q.size(-1) ** -0.5
        p = scores.masked_fill(~alive[:, None, None, :], -torch.inf).softmax(-1)
        context = (p @ v).transpose(1, 2).flatten(2)
        x = F.linear(context, layer.out_weight, layer.out_bias) + hidden
        x = F.layer_norm(x, x.shape[-1:], layer.norm1_weight, layer.norm1_bias, layer.norm1_eps)
        inner = F.linear(x, layer.ffn_in_weight, layer.ffn_in_bias)
        inner = F.gelu(inner) if layer.activation == "gelu" else layer.activation(inner)
        y = F.linear(inner, layer.ffn_out_weight, layer.ffn_out_bias) + x
        y = F.layer_norm(y, x.shape[-1:], layer.norm2_weight, layer.norm2_bias, layer.norm2_eps)
        hidden = torch.where(alive[..., None], y, hidden)
    return hidden
