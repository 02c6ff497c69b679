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

    P(keep) under a draw is the sigmoid of the logit, whatever the temperature in training was.
    """

    def __init__(
        self, predictors: Sequence[PredictorWeights], kernels: KernelSet, logit_threshold: float, sample: bool
    ) -> None:
        self.predictors = predictors
        self.kernels = kernels
        self.logit_threshold = logit_threshold
        self.sample = sample

    def __call__(self, layer: int, batch: Ragged) -> Tensor:
        logit = self.predictors[layer].logit(batch, self.kernels)
        if self.sample:
            logit = logit + logistic_noise(logit)
        # Not `>=`: a token whose state is NaN stays, and shows, instead of vanishing quietly.
        return ~(logit < self.logit_threshold)


class SchedulePolicy:
    """Synthetic: layer l works on `ratios[l]` of each sequence's tokens, chosen without looking at them.

    The choice is spread evenly over the sequence, the first token included, and shrinks from layer to layer. The
    predictors run and are ignored, so that a timing includes them.
    """

    def __init__(
        self, ratios: Sequence[float], batch: Ragged, predictors: Sequence[PredictorWeights], kernels: KernelSet
    ) -> None:
        self.predictors = predictors
        self.kernels = kernels
        last = torch.full((batch.hidden.size(0),), -1, device=batch.slots.device)
        lengths = batch.cu_seqlens.diff().long()
        token = torch.arange(batch.capacity, device=batch.slots.device)
        sequence = torch.bucketize(token, batch.cu_seqlens[1:].long(), right=True).clamp(max=max(batch.batch - 1, 0))
        length = lengths[sequence] if batch.batch else torch.ones_like(token)
        rank = _spread_rank(token - batch.cu_seqlens[:-1].long()[sequence], length) if batch.batch else token
        depth = torch.zeros_like(token)  # how many layers work on the token
        for ratio in ratios:
            depth += rank < scheduled_count(length, ratio)
        valid = token < batch.cu_seqlens[-1]
        # Entries behind the list are garbage: they are sent to a row of their own.
        target = torch.where(valid, batch.slots.long(), last.numel())
        self.depth = torch.cat([last, last.new_zeros(1)]).scatter_(0, target, depth)  # by slot, one spare

    def __call__(self, layer: int, batch: Ragged) -> Tensor:
        self.predictors[layer].logit(batch, self.kernels)
        slots = batch.slots.long().clamp(0, self.depth.numel() - 1)
        return self.depth[slots] > layer


def scheduled_count(length: Tensor, ratio: float) -> Tensor:
    """Tokens of a sequence of `length` (int64) that a layer with keep ratio `ratio` works on: at least one."""
    return (length * ratio).round().long().clamp(min=1)


def _spread_rank(position: Tensor, length: Tensor) -> Tensor:
    """A rank of each position (int64, below `length`) such that any number of first ranks is spread over the sequence.

    Positions are ranked by the fractional part of their multiple of the golden ratio; position 0 comes first.
    """
    longest = int(length.max()) if length.numel() else 0
    return _rank_table(longest).to(position.device)[length, position.clamp(0, max(longest - 1, 0))]


@functools.lru_cache(maxsize=4)
def _rank_table(longest: int) -> Tensor:
    """int64 [longest + 1, longest]: entry [n, p] is the rank of position p among the first n positions."""
    golden = (math.sqrt(5) - 1) / 2
    key = torch.arange(max(longest, 1), dtype=torch.float64).mul(golden).remainder(1)
    before = (key[:, None] < key[None, :]).long().cumsum(0)  # [n - 1, p]
    return torch.cat([torch.zeros_like(before[:1]), before])


def logistic_noise(like: Tensor) -> Tensor:
    """A difference of two standard Gumbel draws."""
    uniform = torch.rand_like(like, dtype=torch.float32).clamp_(1e-7, 1 - 1e-7)
    return uniform.logit()
