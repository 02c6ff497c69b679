"""A post-LayerNorm encoder on a ragged batch: every layer works on the survivors, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..onednn import round_up_rows
from ..ragged import Ragged
from ..registry import KernelSet


@dataclass(frozen=True)
class LayerWeights:
    """One post-LN layer. Matrices [out, in], possibly packed by the backend; the attention projections are fused."""

    qkv_weight: Tensor  # [3d, d]
    qkv_bias: Tensor | None
    out_weight: Tensor  # [d, d]
    out_bias: Tensor | None
    norm1_weight: Tensor
    norm1_bias: Tensor
    norm1_eps: float
    ffn_in_weight: Tensor  # [ff, d]
    ffn_in_bias: Tensor | None
    ffn_out_weight: Tensor  # [d, ff]
    ffn_out_bias: Tensor | None
    norm2_weight: Tensor
    norm2_bias: Tensor
    norm2_eps: float
    # A name `ragged_linear` knows, or any elementwise function.
    activation: str | Callable[[Tensor], Tensor]
    # The halves of the fused projection, for a last layer that computes the first token's output only.
    query: tuple[Tensor, Tensor | None] | None = None  # [d, d], [d]
    key_value: tuple[Tensor, Tensor | None] | None = None  # [2d, d], [2d]


@dataclass(frozen=True)
class PredictorWeights:
    """One skim predictor, in the order of `skim_logit`'s arguments."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    fc_weight: Tensor
    fc_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    out_weight: Tensor  # [m], keep minus skim
    out_bias: Tensor  # [1]
    eps: float

    def logit(self, batch: Ragged, kernels: KernelSet) -> Tensor:
        """fp32 [capacity], by list position."""
        return kernels.skim_logit(
            batch.hidden,
            batch.slots,
            batch.cu_seqlens,
            self.norm1_weight,
            self.norm1_bias,
            self.fc_weight,
            self.fc_bias,
            self.norm2_weight,
            self.norm2_bias,
            self.out_weight,
            self.out_bias,
            self.eps,
        )


# Called before a layer: (layer, batch) -> bool [capacity] by list position, or None to keep every token.
Policy = Callable[[int, Ragged], Tensor | None]


@dataclass
class Trace:
    """The survivors each layer worked on: `slots` int32 [capacity], `cu_seqlens` int32 [batch + 1] per layer."""

    slots: list[Tensor] = field(default_factory=list)
    cu_seqlens: list[Tensor] = field(default_factory=list)


def run_encoder(
    batch: Ragged,
    layers: Sequence[LayerWeights],
    num_heads: int,
    kernels: KernelSet,
    *,
    policy: Policy | None = None,
    first_token_only: bool = False,
    trace: Trace | None = None,
) -> None:
    """Runs the layers over `batch.hidden`, in place; a token's row keeps the state in which it was skimmed.

    Args:
        batch: on return, the list holds the survivors of the last layer.
        layers: in order; one object may stand several times (ALBERT).
        num_heads: attention heads of every layer.
        kernels: the operators to run on.
        policy: decides before each layer who goes on; the first token of a sequence always does.
        first_token_only: the last layer updates the first token of each sequence only (exact for a head that reads
            nothing else); the other rows are left in their previous state.
        trace: filled with the survivors of every layer.
    """
    for index, layer in enumerate(layers):
        keep = policy(index, batch) if policy is not None else None
        if keep is not None:
            batch.keep(keep, kernels)
        if index == 0 or keep is not None:
            _trim(batch)
        if trace is not None:
            trace.slots.append(batch.slots)
            trace.cu_seqlens.append(batch.cu_seqlens)
        if first_token_only and index == len(layers) - 1:
            _last_layer(batch, layer, num_heads, kernels)
        else:
            _layer(batch, layer, num_heads, kernels)


def _trim(batch: Ragged) -> None:
    """On a CPU the token count is at hand: the list, and so every buffer made from it, shrinks to it.

    On a device the list keeps its capacity, because the count is not read back.
    """
    if batch.slots.device.type == "cpu" and not torch.compiler.is_compiling():
        batch.slots = batch.slots[: round_up_rows(int(batch.cu_seqlens[-1]), batch.capacity)]


def _layer(batch: Ragged, layer: LayerWeights, num_heads: int, kernels: KernelSet) -> None:
    hidden, slots, cu_seqlens, longest = batch.hidden, batch.slots, batch.cu_seqlens, batch.max_seqlen
    width = hidden.size(1)
    qkv = kernels.ragged_linear(hidden, layer.qkv_weight, layer.qkv_bias, cu_seqlens, slots, "none")
    q, k, v = qkv.view(-1, 3, num_heads, width // num_heads).unbind(1)  # [capacity, H, D] each
    context, _, _ = kernels.ragged_attention(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, (width // num_heads) ** -0.5, None, False
    )
    _after_attention(batch, layer, context.view(-1, width), slots, cu_seqlens, kernels)


def _last_layer(batch: Ragged, layer: LayerWeights, num_heads: int, kernels: KernelSet) -> None:
    """Keys and values of every survivor, but query, output and FFN of the first tokens only."""
    assert layer.query is not None and layer.key_value is not None
    hidden, slots, cu_seqlens = batch.hidden, batch.slots, batch.cu_seqlens
    width = hidden.size(1)
    first, cu_first = batch.first_tokens()
    q = kernels.ragged_linear(hidden, *layer.query, cu_first, first, "none")
    kv = kernels.ragged_linear(hidden, *layer.key_value, cu_seqlens, slots, "none")
    k, v = kv.view(-1, 2, num_heads, width // num_heads).unbind(1)  # [capacity, H, D] each
    q = q.view(-1, num_heads, width // num_heads)
    context, _, _ = kernels.ragged_attention(
        q, k, v, cu_first, cu_seqlens, 1, batch.max_seqlen, (width // num_heads) ** -0.5, None, False
    )
    _after_attention(batch, layer, context.view(-1, width), first, cu_first, kernels)


def _after_attention(
    batch: Ragged, layer: LayerWeights, context: Tensor, slots: Tensor, cu_seqlens: Tensor, kernels: KernelSet
) -> None:
    """Output projection and FFN of the rows in `context` [capacity, d], written back to their slots."""
    x = kernels.ragged_linear_norm(
        context,
        layer.out_weight,
        layer.out_bias,
        batch.hidden,
        slots,
        layer.norm1_weight,
        layer.norm1_bias,
        layer.norm1_eps,
        cu_seqlens,
    )
    fused = isinstance(layer.activation, str)
    inner = kernels.ragged_linear(
        x, layer.ffn_in_weight, layer.ffn_in_bias, cu_seqlens, None, layer.activation if fused else "none"
    )
    if not isinstance(layer.activation, str):
        inner = layer.activation(inner)
    kernels.ragged_linear_norm_(
        batch.hidden,
        slots,
        inner,
        layer.ffn_out_weight,
        layer.ffn_out_bias,
        x,
        layer.norm2_weight,
        layer.norm2_bias,
        layer.norm2_eps,
        cu_seqlens,
    )
