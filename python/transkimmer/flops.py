"""FLOPs of an encoder counted from the tokens each layer works on (closed forms, matrix products only).

A multiply-add is 2 FLOPs. Biases, softmax, GELU and LayerNorm are not counted, in the dense model or in the skimming
one; the skim predictors are. Data-set figures are ratios of sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of an encoder: layers, hidden size, FFN size, and the skim predictors' inner width (0: no predictors)."""

    layers: int
    hidden: int
    ffn: int
    predictor: int = 0

    @classmethod
    def of(cls, config: object, predictor: int = 0) -> EncoderShape:
        """From a Hugging Face config."""
        ffn = getattr(config, "intermediate_size", None) or config.hidden_dim  # type: ignore[attr-defined]
        return cls(config.num_hidden_layers, config.hidden_size, ffn, predictor)  # type: ignore[attr-defined]

    def layer_macs(self, tokens: Tensor) -> Tensor:
        """Multiply-adds of one layer on sequences of `tokens` (int64, any shape): 12 n d^2 + 2 n^2 d for BERT."""
        d = self.hidden
        return tokens * (4 * d * d + 2 * d * self.ffn) + 2 * tokens * tokens * d

    def predictor_macs(self, arriving: Tensor) -> Tensor:
        """Multiply-adds of one predictor; `arriving` tokens per sequence, of which the first is never scored."""
        return (arriving - 1).clamp(min=0) * (self.hidden * self.predictor + 2 * self.predictor)

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

    def padded_flops_speedup(self, lengths: Tensor, layer_lengths: Tensor, padded_length: int) -> float:
        """The same over a dense run on sequences padded to `padded_length` (the paper's "Sequence" column)."""
        dense = self.dense_flops(lengths.clamp(min=padded_length))
        return dense / max(self.skimming_flops(lengths, layer_lengths), 1)
