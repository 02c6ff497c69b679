"""Who goes on to the next layer: policies of the ragged encoder."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from transkimmer_kernels import KernelSet, Ragged
from transkimmer_kernels.runtime import PredictorWeights


class PredictorPolicy:
    """Transkimmer: a token goes on where its predictor's logit reaches the threshold, or by a draw.

    P(keep) under a draw is the sigmoid of what the logit has above the threshold's (at 0.5: of the logit), whatever the
    temperature in training was.
    """

    def __init__(
        self, predictors: Sequence[PredictorWeights], kernels: KernelSet, logit_threshold: float, sample: bool
    ) -> None:
        self.predictors = predictors
        self.kernels = kernels
        self.logit_threshold = logit_threshold
        self.sample = sample

    def __call__(self, layer: int, batch: Ragged) -> None:
        predictor = self.predictors[layer]
        if not self.sample:
            predictor.skim(batch, self.kernels, self.logit_threshold)
            return
        logit = predictor.logit(batch, self.kernels)
        # Not `>=`: a token whose state is NaN stays, and shows, instead of vanishing quietly.
        batch.keep(~(logit + logistic_noise(logit) < self.logit_threshold), self.kernels)


class SchedulePolicy:
    """Synthetic: layer l works on `ratios[l]` of each sequence's tokens, chosen without looking at them.

    The choice is spread evenly over the sequence, the first token included, and shrinks from layer to layer. The
    predictors run and are ignored, so that a timing includes them, and so are compactions, one per layer at least.
    """

    def __init__(
        self, ratios: Sequence[float], batch: Ragged, predictors: Sequence[PredictorWeights], kernels: KernelSet
    ) -> None:
        self.predictors = predictors
        self.kernels = kernels
        # By position in the list that the encoder starts with: [layers, capacity].
        self.keep = _scheduled(ratios, batch)
        # All of them at once: between layers, which fill the caches with weights, a call takes several times as long.
        self._lists = [kernels.compact(keep, batch.slots, batch.cu_seqlens, True) for keep in self.keep]
        # As `PredictorPolicy` decides; but where the list is a kernel of its own, one per layer is enough.
        self._carried_out = kernels.serves["skim_tokens"] == "cpu"

    def __call__(self, layer: int, batch: Ragged) -> None:
        predictor = self.predictors[layer]
        if self._carried_out:
            predictor.skim(batch, self.kernels, 0.0)
        else:
            predictor.logit(batch, self.kernels)
        batch.slots, batch.cu_seqlens = self._lists[layer]


def _scheduled(ratios: Sequence[float], batch: Ragged) -> Tensor:
    """bool [layers, capacity]: whether a layer works on the token."""
    if batch.batch == 0:
        return torch.zeros(len(ratios), batch.capacity, dtype=torch.bool, device=batch.slots.device)
    token = torch.arange(batch.capacity, device=batch.slots.device)
    # Entries behind the list are garbage: whatever they get is ignored.
    sequence = torch.bucketize(token, batch.cu_seqlens[1:], right=True).clamp_(max=batch.batch - 1)
    lengths = batch.cu_seqlens.diff()
    # A bound that is not too large will do, and nothing is read back; packed input may come without one.
    longest = batch.max_seqlen if batch.max_seqlen <= _LONGEST_TABLE else int(lengths.max())
    depths = _depth_table(tuple(ratios), 1 << max(longest - 1, 0).bit_length(), token.device)
    position = (token - batch.cu_seqlens[sequence]).clamp_(max=depths.size(1) - 1)
    layer = torch.arange(len(ratios), device=token.device)
    return depths[lengths[sequence], position] > layer[:, None]


def scheduled_count(length: Tensor, ratio: float) -> Tensor:
    """Tokens of a sequence of `length` (int64) that a layer with keep ratio `ratio` works on: at least one."""
    return (length * ratio).round().long().clamp(min=1)


_LONGEST_TABLE = 2048


@functools.cache  # never forgotten: a captured graph knows no more of it than where it lies
def _depth_table(ratios: tuple[float, ...], longest: int, device: torch.device) -> Tensor:
    """int16 [longest + 1, longest or 1]: entry [n, p] is how many layers work on position p of a sequence of n tokens.

    Positions are ranked by the fractional part of their multiple of the golden ratio, so that any number of first
    ranks is spread evenly over the sequence; position 0 comes first.
    """
    golden = (math.sqrt(5) - 1) / 2
    key = torch.arange(max(longest, 1), dtype=torch.float64).mul(golden).remainder(1)
    before = (key[:, None] < key[None, :]).long().cumsum(0)  # [n - 1, p], the rank of p among the first n positions
    rank = torch.cat([torch.zeros_like(before[:1]), before])[: longest + 1]
    length = torch.arange(longest + 1)
    depth = torch.zeros_like(rank)
    for ratio in ratios:
        depth += rank < scheduled_count(length, ratio)[:, None]
    return depth.short().to(device)


def logistic_noise(like: Tensor) -> Tensor:
    """A difference of two standard Gumbel draws."""
    uniform = torch.rand_like(like, dtype=torch.float32).clamp_(1e-7, 1 - 1e-7)
    return uniform.logit()
