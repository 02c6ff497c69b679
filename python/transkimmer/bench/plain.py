"""The plain-PyTorch way to run an encoder without padding: the baseline our kernels have to beat.

Packed rows, `F.linear`, one `scaled_dot_product_attention` call per sequence. Nothing of `transkimmer_kernels` is used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architectures import Architecture, get


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
        for layer, weight, bias in zip(self.layers, self.weights, self.biases, strict=True):
            hidden = _layer(hidden, lengths, layer, self.architecture, self.num_heads, weight, bias)
        return hidden


def _layer(
    hidden: Tensor,
    lengths: Sequence[int],
    layer: nn.Module,
    architecture: Architecture,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
) -> Tensor:
    a = architecture
    tokens, width = hidden.shape
    qkv = F.linear(hidden, qkv_weight, qkv_bias).view(tokens, 3, num_heads, width // num_heads)
    contexts = []
    for part in qkv.split(list(lengths)):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in part.unbind(1))  # [1, H, n, D]
        contexts.append(F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1))
    context = torch.cat(contexts).reshape(tokens, width)
    x = get(layer, a.norm1)(get(layer, a.out)(context) + hidden)
    y = get(layer, a.ffn_out)(get(layer, a.activation)(get(layer, a.ffn_in)(x)))
    return get(layer, a.norm2)(y + x)
