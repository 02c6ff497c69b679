"""The encoder in training: packed sequences, skimmed tokens with keep weight 0 inside the softmax.

With the weight inside the softmax, training computes exactly what removal computes, and stays differentiable in the
decisions (straight-through Gumbel softmax; Transkimmer, sections 3.3 and 4.1). By default every token stays in the
batch to the end. In pruned training a skimmed one stays for the layer that skims it, whose attention tells its decision
what it would have been worth there, and is then removed: values are the same, the gradient loses what later layers
would have told that decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transkimmer_kernels import KernelSet

from .architectures import Architecture, get, is_plain_norm
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


@dataclass(frozen=True)
class PackedSequences:
    """Which rows of [tokens, d] belong together. `first`: bool [tokens], the first token of each sequence."""

    cu_seqlens: Tensor
    max_seqlen: int
    first: Tensor


@dataclass
class LayerDecisions:
    """What one layer decided on the n tokens that reached it.

    rows: int32 [n], their rows in the encoder's input; cu_seqlens: int32 [sequences + 1], offsets in these rows;
    keep: fp32 [n], 0 or 1, differentiable but in a graphed step; logit: fp32 [n], None where nothing was decided.
    """

    rows: Tensor
    cu_seqlens: Tensor
    keep: Tensor
    logit: Tensor | None


@dataclass
class TrainingResult:
    """hidden: [tokens, d] final states, forwarded rows included; layers: what each of them decided.

    skim_loss: the mean share of the tokens that layers worked on (Eq. 6), where it is at hand already.
    """

    hidden: Tensor
    layers: list[LayerDecisions]
    skim_loss: Tensor | None = None


@dataclass(frozen=True)
class TrainingEncoder:
    """Layers, their predictors (None: nothing is skimmed), and how they are run.

    temperature, noise: of the draws, see `straight_through_keep`.
    recompute: feed-forward networks and predictors keep no activations, and recompute them in the backward pass.
    first_token_only: nothing but the first tokens' final states is read. Pruned training then leaves a skimmed token
    out as a query in the layer that skims it as well: its output there could only matter to a readout of it.
    """

    layers: Sequence[nn.Module]
    predictors: Sequence[nn.Module] | None
    architecture: Architecture
    config: SkimConfig
    num_heads: int
    kernels: KernelSet
    temperature: float | Tensor
    noise: float | Tensor
    first_token_only: bool = False
    recompute: bool = False

    def run(self, hidden: Tensor, sequences: PackedSequences) -> TrainingResult:
        """hidden: packed states [tokens, d]."""
        keep = hidden.new_ones(hidden.size(0), dtype=torch.float32)
        rows = torch.arange(hidden.size(0), dtype=torch.int32, device=hidden.device)
        present = _Present(hidden, hidden, keep, rows, sequences)
        result = TrainingResult(hidden, [])
        removed: list[_Removed] = []
        for index, layer in enumerate(self.layers):
            present, decided = self._decide(index, present)
            result.layers.append(decided)
            keys, split = present, self._split_by_decision(index, present)
            if split is not None and self.first_token_only:
                present = _remove_skimmed(present, split, removed, self.kernels)
            present = self._apply(layer, present, keys)
            if split is not None and not self.first_token_only:
                present = _remove_skimmed(present, split, removed, self.kernels)
        result.hidden = _in_input_order(present, removed, sequences, self.kernels)
        return result

    def _decide(self, index: int, present: _Present) -> tuple[_Present, LayerDecisions]:
        logit = None
        if self.predictors is not None:
            predictor = self.predictors[index]
            logit = self._perhaps_recomputed(lambda x: predictor(x, self._norm), present.hidden)  # [n]
            decided = straight_through_keep(logit, self.temperature, self.noise)
            # A skimmed token never comes back; the first token is never scored.
            present = replace(present, keep=present.keep * torch.where(present.sequences.first, 1.0, decided))
        return present, LayerDecisions(present.rows, present.sequences.cu_seqlens, present.keep, logit)

    def _split_by_decision(self, index: int, present: _Present) -> _Split | None:
        """The tokens to remove because of this layer; None: there are none, or removing them would save nothing."""
        if self.predictors is None or not self.config.pruned_training:
            return None
        if index == len(self.layers) - 1 and not self.first_token_only:
            return None
        return _split_by_decision(present, self.kernels)

    def _apply(self, layer: nn.Module, present: _Present, keys: _Present) -> _Present:
        """Runs a layer on the tokens `present`, which attend to `keys`."""
        arguments = (layer, present.hidden, present.sequences, keys.hidden, keys.keep, keys.sequences)
        if getattr(layer, "gradient_checkpointing", False):
            hidden = checkpoint(self._layer, *arguments, use_reentrant=False)
        else:
            hidden = self._layer(*arguments)
        final = hidden
        if self.predictors is not None:
            final = self.kernels.choose_rows(present.keep, hidden, present.final.to(hidden.dtype))
        return replace(present, hidden=hidden, final=final)

    def _layer(
        self,
        layer: nn.Module,
        hidden: Tensor,
        sequences: PackedSequences,
        key_hidden: Tensor,
        keep: Tensor,
        key_sequences: PackedSequences,
    ) -> Tensor:
        a = self.architecture
        q, k, v = (
            get(layer, path)(x).view(x.size(0), self.num_heads, x.size(1) // self.num_heads)
            for path, x in ((a.query, hidden), (a.key, key_hidden), (a.value, key_hidden))
        )
        context = keep_attention(q, k, v, keep, sequences, key_sequences, self.config, self.kernels)
        x = _dropout(layer, a.attention_dropout, get(layer, a.out)(context.reshape(hidden.shape)))
        x = self._norm(get(layer, a.norm1), x, hidden)
        y = self._perhaps_recomputed(
            lambda x: get(layer, a.ffn_out)(get(layer, a.activation)(get(layer, a.ffn_in)(x))), x
        )
        return self._norm(get(layer, a.norm2), _dropout(layer, a.ffn_dropout, y), x)

    def _norm(self, module: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """module(x + residual)."""
        # On a CPU it would be the same operators as the module's.
        if self.kernels.serves["add_norm"] == "triton" and is_plain_norm(module):
            y: Tensor = self.kernels.add_norm(x, residual, module.weight, module.bias, module.eps)[0]
            return y
        summed: Tensor = module(x if residual is None else x + residual)
        return summed

    def _perhaps_recomputed(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x), which draws nothing; keeps no activations of it where `recompute` says so."""
        if not self.recompute:
            return function(x)
        result: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
        return result


def drawing_noise() -> bool:
    """Whether training forwards draw their decisions now."""
    return _noiseless.get() is None


def straight_through_keep(logit: Tensor, temperature: float | Tensor, noise: float | Tensor = 1.0) -> Tensor:
    """A 0/1 draw with P(1) = sigmoid(logit / noise), at noise 0 whether the logit is 0 at least, as inference decides.

    Its gradient is that of sigmoid((logit + noise * logistic) / temperature), at noise 1 Eq. 5.
    """
    threshold = _noiseless.get()
    noisy = logit + noise * logistic_noise(logit) if threshold is None else logit - threshold
    soft = torch.sigmoid(noisy / temperature)
    # Written so that the value is exactly 0 or 1: hard + (soft - soft) rounds to it, (hard - soft) + soft does not.
    return (noisy >= 0).float() + (soft - soft.detach())


def keep_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    sequences: PackedSequences,
    key_sequences: PackedSequences,
    config: SkimConfig,
    kernels: KernelSet,
) -> Tensor:
    """Attention of the queries [m, heads, head_dim] of `sequences` to keys and values [n, heads, head_dim].

    keep: weights of the keys, fp32 [n].
    """
    weight: Tensor | None = keep
    if config.skim_attention == "published":
        # P * m without renormalisation is plain attention on weighted values.
        v, weight = v * keep.to(v.dtype)[:, None, None], None
    own, theirs = sequences, key_sequences
    out, _, _ = kernels.ragged_attention(
        *(q, k, v, own.cu_seqlens, theirs.cu_seqlens, own.max_seqlen, theirs.max_seqlen),
        *(q.size(2) ** -0.5, weight, False),
    )
    return out


def _dropout(layer: nn.Module, path: str | None, x: Tensor) -> Tensor:
    return x if path is None else get(layer, path)(x)


@dataclass(frozen=True)
class _Present:
    """The n tokens still in the batch.

    hidden: [n, d]; final: [n, d], what a head would read now, the same values with other gradients;
    keep: fp32 [n]; rows: int32 [n], rows in the encoder's input.
    """

    hidden: Tensor
    final: Tensor
    keep: Tensor
    rows: Tensor
    sequences: PackedSequences


@dataclass(frozen=True)
class _Split:
    """Row numbers, int32, of the tokens that stay (`sequences` describes them) and of those that leave."""

    staying: Tensor
    sequences: PackedSequences
    leaving: Tensor
    leaving_cu_seqlens: Tensor


@dataclass(frozen=True)
class _Removed:
    """Final states [m, d] of removed tokens, and their rows in the encoder's input."""

    final: Tensor
    rows: Tensor


def _split_by_decision(present: _Present, kernels: KernelSet) -> _Split | None:
    """None where every token stays. The host reads two numbers: how many stay, and the longest sequence's length."""
    rows = torch.arange(present.keep.numel(), dtype=torch.int32, device=present.keep.device)
    if rows.numel() == 0:
        return None
    cu_seqlens, stays = present.sequences.cu_seqlens, present.keep.detach() > 0.5
    staying, shorter = kernels.compact(stays, rows, cu_seqlens, False)
    count, longest = torch.stack([shorter[-1], shorter.diff().max()]).tolist()
    if count == rows.numel():
        return None
    staying = staying[:count]
    leaving, leaving_cu_seqlens = kernels.compact(~stays, rows, cu_seqlens, False)
    sequences = PackedSequences(shorter, longest, present.sequences.first.index_select(0, staying))
    return _Split(staying, sequences, leaving[: rows.numel() - count], leaving_cu_seqlens)


def _remove_skimmed(present: _Present, split: _Split, removed: list[_Removed], kernels: KernelSet) -> _Present:
    """The tokens that stay; those that leave are added to `removed`."""
    final = kernels.gather_rows(present.final, split.leaving, split.leaving_cu_seqlens)
    removed.append(_Removed(final, present.rows.index_select(0, split.leaving)))
    hidden, final, keep = (
        kernels.gather_rows(x, split.staying, split.sequences.cu_seqlens)
        for x in (present.hidden, present.final, present.keep)
    )
    return _Present(hidden, final, keep, present.rows.index_select(0, split.staying), split.sequences)


def _in_input_order(
    present: _Present, removed: Sequence[_Removed], sequences: PackedSequences, kernels: KernelSet
) -> Tensor:
    """The final state of every token [tokens, d], in the order of the encoder's input, which `sequences` describes."""
    if not removed:
        return present.final
    rows = torch.cat([*(gone.rows for gone in removed), present.rows])
    final = torch.cat([*(gone.final for gone in removed), present.final])
    return kernels.scatter_rows(final, rows, sequences.cu_seqlens, rows.numel())
