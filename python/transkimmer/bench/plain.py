"""The plain-PyTorch way to run an encoder without padding: the baseline our kernels have to beat.

Packed rows, `F.linear`, and PyTorch's `varlen_attn` where it has a kernel (CUDA, half precision), elsewhere one
`scaled_dot_product_attention` call per sequence. Nothing of `transkimmer_kernels` is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architectures import Architecture, get

# (q, k, v), each [tokens, heads, head size] -> the same.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class PackedEncoder:
    """A dense encoder on packed states; the fused projection weights are prepared once, as a fair baseline would."""

    def __init__(self, layers: Sequence[nn.Module], architecture: Architecture, num_heads: int) -> None:
        self.layers = layers
        self.architecture = architecture
        self.num_heads = num_heads
        paths = (architecture.query, architecture.key, architecture.value)
        self.weights = [torch.cat([get(layer, path).weight.detach() for path in paths]) for layer in layers]
        self.biases = [torch.cat([get(layer, path).bias.detach() for path in paths]) for layer in layers]

    def __call__(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """hidden [tokens, d], sequences of `lengths` one after another -> [tokens, d]."""
        attend = attention(hidden, lengths)
        for layer, weight, bias in zip(self.layers, self.weights, self.biases, strict=True):
            hidden = _layer(hidden, attend, layer, self.architecture, self.num_heads, weight, bias)
        return hidden


def attention(hidden: Tensor, lengths: Sequence[int]) -> Attend:
    """PyTorch's best attention among sequences of `lengths` for states like `hidden`."""
    if hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16):
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:  # older than its 2.10
            return one_by_one(lengths)
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=hidden.device)
        longest = max(lengths)
        return lambda q, k, v: cast(Tensor, varlen_attn(q, k, v, offsets, offsets, longest, longest))
    return one_by_one(lengths)


def one_by_one(lengths: Sequence[int]) -> Attend:
    def attend(*qkv: Tensor) -> Tensor:
        contexts = []
        for parts in zip(*(x.split(list(lengths)) for x in qkv), strict=True):
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in parts)  # [1, H, n, D]
            contexts.append(F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1))
        return torch.cat(contexts)

    return attend


def _layer(
    hidden: Tensor,
    attend: Attend,
    layer: nn.Module,
    architecture: Architecture,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
) -> Tensor:
    a = architecture
    tokens, width = hidden.shape
    qkv = F.linear(hidden, qkv_weight, qkv_bias).view(tokens, 3, num_heads, width // num_heads)
    context = attend(*qkv.unbind(1)).reshape(tokens, width)
    x = get(layer, a.norm1)(get(layer, a.out)(context) + hidden)
    y = get(layer, a.ffn_out)(get(layer, a.activation)(get(layer, a.ffn_in)(x)))
    return get(layer, a.norm2)(y + x)
