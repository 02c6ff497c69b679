"""The encoder in training: every token stays in the packed batch, skimmed ones with keep weight 0 inside the softmax.

With the weight inside the softmax, training computes exactly what removal computes, and stays differentiable in the
decisions (straight-through Gumbel softmax; Transkimmer, sections 3.3 and 4.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transkimmer_kernels import KernelSet

from .architectures import Architecture, get
from .config import SkimConfig
from .policies import logistic_noise

# The logit from which a token is kept while no noise is drawn; None: decisions are drawn.
_noiseless: ContextVar[float | None] = ContextVar("transkimmer_noiseless", default=None)


@contextmanager
def decisions_without_noise(logit_threshold: float) -> Iterator[None]:
    """Inside the block, training forwards keep what inference keeps at `logit_threshold`, instead of drawing."""
    token = _noiseless.set(logit_threshold)
    try:
        yield
    finally:
        _noiseless.reset(token)


@dataclass
class TrainingResult:
    """hidden: [tokens, d] final states, forwarded rows included; keep, logits: per layer fp32 [tokens]."""

    hidden: Tensor
    keep: list[Tensor]
    logits: list[Tensor]


@dataclass(frozen=True)
class PackedSequences:
    """Which rows of [tokens, d] belong together. `first`: bool [tokens], the first token of each sequence."""

    cu_seqlens: Tensor
    max_seqlen: int
    first: Tensor


def train_encoder(
    hidden: Tensor,
    sequences: PackedSequences,
    layers: Sequence[nn.Module],
    predictors: Sequence[nn.Module] | None,
    architecture: Architecture,
    config: SkimConfig,
    num_heads: int,
    kernels: KernelSet,
) -> TrainingResult:
    """Runs the layers on packed states [tokens, d]; without predictors nothing is skimmed."""
    keep = hidden.new_ones(hidden.size(0), dtype=torch.float32)
    final = hidden
    result = TrainingResult(hidden, [], [])
    for index, layer in enumerate(layers):
        if predictors is not None:
            logit = predictors[index](hidden)  # [tokens]
            decided = straight_through_keep(logit, config.temperature)
            # A skimmed token never comes back; the first token is never scored.
            keep = keep * torch.where(sequences.first, 1.0, decided)
            result.logits.append(logit)
        arguments = (layer, hidden, keep, sequences, architecture, config, num_heads, kernels)
        if getattr(layer, "gradient_checkpointing", False):
            hidden = checkpoint(_layer, *arguments, use_reentrant=False)
        else:
            hidden = _layer(*arguments)
        # Kept rows take the layer's output, skimmed rows stay as they were when they left.
        final = torch.lerp(final.float(), hidden.float(), keep.unsqueeze(-1)).to(hidden.dtype)
        result.keep.append(keep)
    result.hidden = final
    return result


def straight_through_keep(logit: Tensor, temperature: float) -> Tensor:
    """A 0/1 draw with P(1) = sigmoid(logit) and the gradient of sigmoid((logit + noise) / temperature) (Eq. 5)."""
    threshold = _noiseless.get()
    noisy = logit + logistic_noise(logit) if threshold is None else logit - threshold
    soft = torch.sigmoid(noisy / temperature)
    # Written so that the value is exactly 0 or 1: hard + (soft - soft) rounds to it, (hard - soft) + soft does not.
    return (noisy > 0).float() + (soft - soft.detach())


def _layer(
    layer: nn.Module,
    hidden: Tensor,
    keep: Tensor,
    sequences: PackedSequences,
    architecture: Architecture,
    config: SkimConfig,
    num_heads: int,
    kernels: KernelSet,
) -> Tensor:
    a = architecture
    tokens, width = hidden.shape
    q, k, v = (
        get(layer, path)(hidden).view(tokens, num_heads, width // num_heads) for path in (a.query, a.key, a.value)
    )
    context = _attention(q, k, v, keep, sequences, config, kernels).reshape(tokens, width)
    x = _dropout(layer, a.attention_dropout, get(layer, a.out)(context))
    x = get(layer, a.norm1)(x + hidden)
    y = get(layer, a.ffn_out)(get(layer, a.activation)(get(layer, a.ffn_in)(x)))
    return get(layer, a.norm2)(_dropout(layer, a.ffn_dropout, y) + x)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    sequences: PackedSequences,
    config: SkimConfig,
    kernels: KernelSet,
) -> Tensor:
    weight: Tensor | None = keep
    if config.skim_attention == "published":
        # P * m without renormalisation is plain attention on weighted values.
        v, weight = v * keep.to(v.dtype)[:, None, None], None
    cu_seqlens, longest = sequences.cu_seqlens, sequences.max_seqlen
    out, _, _ = kernels.ragged_attention(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, q.size(2) ** -0.5, weight, False
    )
    return out


def _dropout(layer: nn.Module, path: str | None, x: Tensor) -> Tensor:
    return x if path is None else get(layer, path)(x)
