"""FLOPs of an encoder counted from the tokens each layer works on (closed forms, matrix products only).

A multiply-add is 2 FLOPs. Biases, softmax, GELU and LayerNorm are not counted, in the dense model or in the skimming
one; the skim predictors are. Data-set figures are ratios of sums. `count_flops` counts the same while a model runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transkimmer_kernels.library import OPERATORS

from .architectures import layer_count


class FlopCount(FlopCounterMode):
    """`torch.utils.flop_counter.FlopCounterMode`, and what of it our operators did."""

    def of_operators(self) -> int:
        """FLOPs of this package's operators alone: in inference those of the encoder, layers and predictors."""
        ours = {operator.packet for operator in OPERATORS.values()}
        return sum(flops for packet, flops in self.get_flop_counts().get("Global", {}).items() if packet in ours)


@contextmanager
def count_flops() -> Iterator[FlopCount]:
    """Counts the FLOPs of every matrix product inside the block, in this thread, of real tokens where they are ours.

    Row counts that live on a device are read after each operator: a forward that is counted waits for it, and is
    never a replay of a CUDA graph.
    """
    with FlopCount(display=False) as count:
        yield count


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of an encoder, and what its skim predictors compute.

    Attributes:
        layers, hidden, ffn: layers, hidden size, FFN size.
        predictor: inner width of the skim predictors, 0 where there are none.
        predictor_outputs: 2, keep and skim, is the paper's count; 1 what we execute, only their difference (0.01 % of
            a BERT-base layer less).
        scores_first: whether predictors also score first tokens, which stay anyway (where decisions are drawn).
    """

    layers: int
    hidden: int
    ffn: int
    predictor: int = 0
    predictor_outputs: int = 2
    scores_first: bool = False

    @classmethod
    def of(cls, config: Any, predictor: int = 0) -> EncoderShape:
        """From a Hugging Face config."""
        ffn = getattr(config, "intermediate_size", None) or config.hidden_dim
        return cls(layer_count(config), config.hidden_size, ffn, predictor)

    @classmethod
    def of_model(cls, model: Any) -> EncoderShape:
        """Of a Hugging Face model, and of its predictors where it is a skimming one."""
        skimming = getattr(model, "skimming", None)
        return cls.of(model.config, 0 if skimming is None else skimming.predictors[0].fc.out_features)

    def as_executed(self, *, scores_first: bool = False) -> EncoderShape:
        """The same, with predictors counted as we execute them."""
        return dataclasses.replace(self, predictor_outputs=1, scores_first=scores_first)

    def layer_macs(self, tokens: Tensor) -> Tensor:
        """Multiply-adds of one layer on sequences of `tokens` (int64, any shape): 12 n d^2 + 2 n^2 d for BERT."""
        d = self.hidden
        return tokens * (4 * d * d + 2 * d * self.ffn) + 2 * tokens * tokens * d

    def predictor_macs(self, arriving: Tensor) -> Tensor:
        """Multiply-adds of one predictor; `arriving` tokens per sequence, of which the first need not be scored."""
        scored = arriving if self.scores_first else (arriving - 1).clamp(min=0)
        return scored * (self.hidden * self.predictor + self.predictor_outputs * self.predictor)

    def first_token_macs(self, tokens: Tensor) -> Tensor:
        """Multiply-adds of a layer that computes keys and values of all `tokens`, but the first token's output only."""
        d = self.hidden
        return 2 * tokens * (d * d + d) + (tokens > 0) * (2 * d * d + 2 * d * self.ffn)

    def dense_flops(self, lengths: Tensor, *, first_token_only: bool = False) -> int:
        """FLOPs of the dense encoder on sequences of `lengths` (int64 [sequences])."""
        return self.skimming_flops(
            lengths, lengths.expand(self.layers, -1), first_token_only=first_token_only, predictors=False
        )

    def skimming_flops(
        self, lengths: Tensor, layer_lengths: Tensor, *, first_token_only: bool = False, predictors: bool = True
    ) -> int:
        """FLOPs with `layer_lengths` (int64 [layers, sequences]) tokens worked on.

        `first_token_only`: the last layer as `first_token_macs` counts it, instead of the paper's way, in full.
        """
        if layer_lengths.size(0) != self.layers:
            raise ValueError(f"layer_lengths: expected {self.layers} layers, got {list(layer_lengths.shape)}")
        last = self.first_token_macs if first_token_only else self.layer_macs
        macs = int(self.layer_macs(layer_lengths[:-1]).sum()) + int(last(layer_lengths[-1]).sum())
        if self.predictor and predictors:
            macs += int(self.predictor_macs(lengths).sum()) + int(self.predictor_macs(layer_lengths[:-1]).sum())
        return 2 * macs

    def flops_speedup(self, lengths: Tensor, layer_lengths: Tensor) -> float:
        """Dense FLOPs over skimming FLOPs as the paper counts them: every layer in full, neither with any padding."""
        return self.dense_flops(lengths) / max(self.skimming_flops(lengths, layer_lengths), 1)

    def share_at(self, speedup: float) -> float:
        """Share of the tokens, mean over layers, that about leads to a FLOPs speedup, on sequences that are not long.

        Solves 1 / speedup = share + cost of the predictors, which see the tokens that the layer before worked on.
        """
        predictor = self.predictor / (4 * self.hidden + 2 * self.ffn)  # over a layer, per token
        return max(0.0, (1 / speedup - predictor / self.layers) / (1 + predictor * (1 - 1 / self.layers)))

    def most_flops_speedup(self, lengths: Tensor) -> float:
        """`flops_speedup` where every layer works on the first token only: no decisions lead to more.

        No lengths up to some n lead to more than n alone, or than 1, where the predictors cost more than they save.
        """
        return self.flops_speedup(lengths, torch.ones(self.layers, lengths.numel(), dtype=torch.int64))

    def padded_flops_speedup(self, lengths: Tensor, layer_lengths: Tensor, padded_length: int) -> float:
        """The same over a dense run on sequences padded to `padded_length` (the paper's "Sequence" column)."""
        dense = self.dense_flops(lengths.clamp(min=padded_length))
        return dense / max(self.skimming_flops(lengths, layer_lengths), 1)
