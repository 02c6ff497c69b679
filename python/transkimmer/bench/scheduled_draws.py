"""Predictors whose draws follow a schedule: what a step of training costs, before anything has been learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..policies import scheduled_count
from ..predictor import SkimPredictor
from ..records import record_skimming
from ..skimming import skimming_of
from .workload import Batch

_ROUNDS = 3  # a shift changes the states that later layers see, and so their logits
_LARGEST_SHIFT = 100.0


@torch.no_grad()
def draw_by_schedule(model: PreTrainedModel, batches: Sequence[Batch], ratios: Sequence[float]) -> float:
    """Shifts the last bias of every predictor so that draws keep as many tokens as a schedule does, on average.

    Fresh predictors keep everything. Which tokens go is left to chance and to what logits there are.

    Args:
        model: with skimming, in training mode; not with `pruned_training`. Changed in place.
        batches: where the schedule is met.
        ratios: per layer, the share of a sequence's tokens that it works on.

    Returns:
        Share of the real tokens that the schedule's layers work on, mean over layers.
    """
    lengths = torch.cat([batch.lengths for batch in batches])
    counts = [int(scheduled_count(lengths, ratio).sum()) for ratio in ratios]
    predictors = [cast(SkimPredictor, module) for module in skimming_of(model).predictors]
    for _ in range(_ROUNDS):
        logits = _logits(model, batches)
        survival = torch.ones_like(logits[0])  # [tokens], probability of having been kept so far
        for predictor, logit, count in zip(predictors, logits, counts, strict=True):
            shift = _shift(logit, survival, count - lengths.numel())  # first tokens stay without being asked
            predictor.shift(shift)
            survival *= torch.sigmoid(logit + shift)
    return sum(counts) / (len(counts) * int(lengths.sum()))


def _logits(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Tensor]:
    """Per layer, keep-minus-skim logits fp64 [tokens] of all tokens that are decided about, on the host."""
    with record_skimming() as records:
        for batch in batches:
            model(**batch.inputs)
    layers = range(len(records[0].logits))
    return [torch.cat([record.scored_logits(layer) for record in records]).double().cpu() for layer in layers]


def _shift(logit: Tensor, survival: Tensor, count: int) -> float:
    """What added to the logits lets `count` tokens be kept, on average, of those that survive with these chances."""
    low, high = -_LARGEST_SHIFT, _LARGEST_SHIFT
    for _ in range(60):
        middle = (low + high) / 2
        if float((survival * torch.sigmoid(logit + middle)).sum()) < count:
            low = middle
        else:
            high = middle
    return high
