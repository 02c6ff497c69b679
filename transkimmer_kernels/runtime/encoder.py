"""A post-LayerNorm encoder on a ragged batch: every layer works on the survivors, in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from ..ops.checks import require
from ..ops.encoder_layer.compose import compose_layer_
from ..ragged import Ragged
from ..registry import KernelSet


class _Arguments:
    """A dataclass whose fields stand in the order of an operator's arguments."""

    @functools.cached_property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class LayerWeights(_Arguments):
    """One post-LN layer, in the order of `encoder_layer_`'s arguments.

    Matrices [out, in], possibly packed by the backend; the attention projections are fused. With `query_weight` the
    layer updates only the first token of each sequence.
    """

    qkv_weight: Tensor  # [3d, d]; with query_weight [2d, d], key and value
    qkv_bias: Tensor | None
    query_weight: Tensor | None  # [d, d]
    query_bias: Tensor | None
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
    # A name `encoder_layer_` knows, or any elementwise function.
    activation: str | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PredictorWeights(_Arguments):
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
        return kernels.skim_logit(batch.hidden, batch.slots, batch.cu_seqlens, *self.arguments)

    def skim(self, batch: Ragged, kernels: KernelSet, logit_threshold: float) -> None:
        """Shortens the list to the first tokens and those whose logit is not below the threshold."""
        batch.slots, batch.cu_seqlens = kernels.skim_tokens(
            batch.hidden, batch.slots, batch.cu_seqlens, *self.arguments, logit_threshold, True
        )


# Called before a layer: (layer, batch). Shortens the batch's list to the tokens that go on.
Policy = Callable[[int, Ragged], None]


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
    trace: Trace | None = None,
) -> None:
    """Runs the layers over `batch.hidden`, in place; a token's row keeps the state in which it was skimmed.

    Args:
        batch: its `hidden` contiguous; on return, the list holds the survivors of the last layer.
        layers: in order; one object may stand several times (ALBERT).
        num_heads: attention heads of every layer.
        kernels: the operators to run on.
        policy: decides before each layer who goes on.
        trace: filled with the survivors of every layer.
    """
    hidden = batch.hidden  # the overloads that are called below do not look
    require(hidden.is_contiguous(), f"hidden: is written in place and must be contiguous, got {hidden.stride()}")
    for index, layer in enumerate(layers):
        if policy is not None:
            policy(index, batch)
        if trace is not None:
            trace.slots.append(batch.slots)
            trace.cu_seqlens.append(batch.cu_seqlens)
        state = (batch.hidden, batch.slots, batch.cu_seqlens, batch.max_seqlen, num_heads)
        if isinstance(layer.activation, str):
            kernels.encoder_layer_(*state, *layer.arguments)
        else:
            compose_layer_(kernels, *state, *layer.arguments)
