"""Moves a trained model along its accuracy-speed curve to a wanted FLOPs speedup, without training."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

from ..predictor import SkimPredictor
from ..skimming import skimming_of
from .evaluation import evaluate

# Shifts of the keep-minus-skim logit that are tried: multiples of the step, up to the largest either way.
STEP, LARGEST = 0.05, 4.0


def calibrate(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], flops_speedup: float) -> float:
    """Shifts the last bias of every predictor, by one amount, so that `batches` are read at `flops_speedup` or above.

    `SkimConfig.threshold` stays what it is: decisions at 0.5 stay an argmax. A draw in training and an argmax at
    inference keep different shares of the tokens, so the speedup that a skim weight leads to is only roughly known
    beforehand.

    Args:
        model: with trained predictors; its `SkimConfig` must decide by threshold. Changed in place.
        batches: padded ones of rows that were not trained on, dicts with `input_ids` and `attention_mask`. They are
            moved to the model's device, and read about ten times; `labels` are not looked at.
        flops_speedup: as `SkimEvaluation` counts it, at least 1.

    Returns:
        What was added to the keep-minus-skim logits.

    Raises:
        TypeError: `batches` is a single one, or one of them is no dict.
        ValueError: `flops_speedup` is out of range, the model decides by draws or by a schedule, or the largest shift
            either way leads to less or to more than `flops_speedup`; it is then unchanged.
    """
    if not (math.isfinite(flops_speedup) and flops_speedup >= 1):
        raise ValueError(f"flops_speedup={flops_speedup!r}: must be a finite number >= 1")
    if isinstance(batches, Mapping):
        raise TypeError("batches: must be several of them, got a single one; put it into a list")
    batches = list(batches)
    skimming = skimming_of(model)
    if skimming.config.decision != "threshold" or skimming.config.schedule is not None:
        given = "schedule" if skimming.config.schedule is not None else "decision"
        value = getattr(skimming.config, given)
        raise ValueError(f"model: its SkimConfig.{given} is {value!r}; only decisions by threshold can be calibrated")
    threshold, start = skimming.config.threshold, skimming.config.logit_threshold

    def speedup(raised: int) -> float:
        """With the threshold raised by `raised` steps, which skims more."""
        skimming.config.threshold = 1 / (1 + math.exp(-(start + raised * STEP)))
        return evaluate(model, batches).flops_speedup

    low, high = -round(LARGEST / STEP), round(LARGEST / STEP)
    try:
        if (most := speedup(high)) < flops_speedup:
            raise ValueError(f"flops_speedup={flops_speedup}: skims to {most:.2f} at most; train with more skim weight")
        if (least := speedup(low)) > flops_speedup:
            raise ValueError(
                f"flops_speedup={flops_speedup}: skims to {least:.2f} at least; train with less skim weight"
            )
        raised = bisect.bisect_left(range(low, high), flops_speedup, key=speedup) + low
    finally:
        skimming.config.threshold = threshold
    shift = -raised * STEP
    for predictor in skimming.predictors:
        cast(SkimPredictor, predictor).shift(shift)
    return shift
