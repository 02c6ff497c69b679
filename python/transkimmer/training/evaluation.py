"""Accuracy, tokens kept and FLOPs speedup of a classifier on a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..flops import EncoderShape
from ..records import record_skimming


@dataclass
class SkimEvaluation:
    """Figures over a whole data set, ratios of sums.

    Attributes:
        accuracy: share of right predictions.
        tokens_kept: share of token-layers that were worked on.
        tokens_kept_by_layer: the same per layer.
        flops_speedup: dense FLOPs over skimming FLOPs, no padding counted, predictors included.
        predictions: int64 [examples].
    """

    accuracy: float
    tokens_kept: float
    tokens_kept_by_layer: list[float]
    flops_speedup: float
    predictions: Tensor


def predictor_width(model: PreTrainedModel) -> int:
    """Inner width of a model's skim predictors, 0 where it has none."""
    skimming = getattr(model, "skimming", None)
    return 0 if skimming is None else int(skimming.predictors[0].fc.out_features)


@torch.no_grad()
def evaluate_classifier(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> SkimEvaluation:
    """Runs a sequence classifier, dense or skimming, over `batches` with `labels`, in eval mode."""
    was_training = model.training
    model.eval()
    predictions, right, total = [], 0, 0
    lengths, layer_lengths = [], []
    try:
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            with record_skimming() as records:
                predicted = model(**inputs).logits.argmax(-1)
            right += int((predicted == batch["labels"]).sum())
            total += predicted.numel()
            predictions.append(predicted)
            lengths.append(batch["attention_mask"].sum(1))
            layers = model.config.num_hidden_layers
            layer_lengths.append(records[0].layer_lengths if records else lengths[-1].expand(layers, -1))
    finally:
        model.train(was_training)
    if not total:
        raise ValueError("batches: no examples to evaluate")
    all_lengths, all_layers = torch.cat(lengths), torch.cat(layer_lengths, 1)
    kept = all_layers.sum(1).double() / all_lengths.sum()
    shape = EncoderShape.of(model.config, predictor_width(model))
    return SkimEvaluation(
        accuracy=right / total,
        tokens_kept=float(kept.mean()),
        tokens_kept_by_layer=kept.tolist(),
        flops_speedup=shape.flops_speedup(all_lengths, all_layers),
        predictions=torch.cat(predictions),
    )
