"""Metrics, tokens kept and FLOPs speedup of a model on a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures import layer_count
from ..flops import EncoderShape
from ..outputs import logits_in
from ..records import record_skimming
from ..skimming import skimming_of
from ..training_forward import decisions_without_noise
from .judges import ClassJudge, Judge


@dataclass
class SkimEvaluation:
    """Figures over a whole data set, ratios of sums.

    Attributes:
        metrics: by name, as the judge gives them.
        tokens_kept: share of token-layers that were worked on.
        tokens_kept_by_layer: the same per layer.
        flops_speedup: dense FLOPs over skimming FLOPs, no padding counted, predictors included.
        predictions: classes, int64 [examples], or numbers, fp32; answers by question; or None: nobody judged.
        lengths: int64 [examples]; layer_lengths: int64 [layers, examples]: tokens there, and worked on by each layer.
    """

    metrics: dict[str, float]
    tokens_kept: float
    tokens_kept_by_layer: list[float]
    flops_speedup: float
    predictions: Any
    lengths: Tensor = field(repr=False)
    layer_lengths: Tensor = field(repr=False)

    @property
    def accuracy(self) -> float:
        return self.metrics["accuracy"]

    def to_dict(self) -> dict[str, object]:
        """What is stored of it."""
        names = ("metrics", "tokens_kept", "tokens_kept_by_layer", "flops_speedup")
        return {name: getattr(self, name) for name in names} | {"examples": self.lengths.numel()}


def evaluate_classifier(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], metrics: Sequence[str] = ("accuracy",)
) -> SkimEvaluation:
    """Runs a sequence classifier or regressor, dense or skimming, over `batches` with `labels`, in eval mode."""
    return evaluate(model, batches, ClassJudge(metrics))


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], judge: Judge | None = None
) -> SkimEvaluation:
    """Runs a model with any head over `batches`, in eval mode; without a `judge` only costs are counted."""
    was_training = model.training
    model.eval()
    lengths, layer_lengths = [], []
    layers = layer_count(model.config)
    try:
        for batch in batches:
            with record_skimming() as records:
                output = model(**inputs_of(batch, model))
            if judge is not None:
                judge.see(batch, output)
            lengths.append(records[0].lengths if records else batch["attention_mask"].flatten(0, -2).sum(-1).cpu())
            layer_lengths.append(records[0].layer_lengths if records else lengths[-1].expand(layers, -1))
    finally:
        model.train(was_training)
    if not lengths:
        raise ValueError("batches: no examples to evaluate")
    all_lengths, all_layers = torch.cat(lengths), torch.cat(layer_lengths, 1)
    kept = all_layers.sum(1).double() / all_lengths.sum()
    shape = EncoderShape.of_model(model)
    return SkimEvaluation(
        metrics={} if judge is None else judge.metrics(),
        tokens_kept=float(kept.mean()),
        tokens_kept_by_layer=kept.tolist(),
        flops_speedup=shape.flops_speedup(all_lengths, all_layers) if shape.predictor else 1.0,
        predictions=None if judge is None else judge.predictions,
        lengths=all_lengths,
        layer_lengths=all_layers,
    )


@dataclass
class ForwardDifference:
    """How far the training forward and removal lie apart.

    Attributes:
        max_difference, max_logit: largest difference of a logit, and largest logit; NaN where a logit is.
        agreement: share of rows with the same class, or classes; None where the output is a number.
        metrics: of the training forward, as the judge gives them.
    """

    max_difference: float
    max_logit: float
    agreement: float | None
    metrics: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def training_forward_difference(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], judge: Judge | None = None
) -> ForwardDifference:
    """Compares logits of the training forward, its noise and dropout off, with those of real removal."""
    was_training = model.training
    largest, same, total, outputs = torch.zeros(2, dtype=torch.float64), 0, 0, 0
    try:
        with deciding(model, "threshold"):
            for batch in batches:
                inputs = inputs_of(batch, model)
                removed = logits_in(model.eval()(**inputs))
                output = _training_forward(model, inputs)
                if judge is not None:
                    judge.see(batch, output)
                masked = logits_in(output)
                found = torch.stack([(masked - removed).abs().max(), removed.abs().max()])
                largest = torch.maximum(largest, found.cpu().double())  # Python's max would lose a NaN
                same += int((masked.argmax(-1) == removed.argmax(-1)).view(removed.size(0), -1).all(1).sum())
                total += removed.size(0)
                outputs = removed.size(-1)
    finally:
        model.train(was_training)
    agreement = None if outputs == 1 else same / max(total, 1)
    difference, logit = largest.tolist()
    return ForwardDifference(difference, logit, agreement, {} if judge is None else judge.metrics())


def _training_forward(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Any:
    """Deterministic; leaves the model in training mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with decisions_without_noise(skimming_of(model).config.logit_threshold):
        return model(**inputs)


@contextmanager
def deciding(model: PreTrainedModel, decision: str) -> Iterator[None]:
    """Inside, a skimming model decides so (`SkimConfig.decision`), and afterwards again as before."""
    config = skimming_of(model).config
    before, config.decision = config.decision, decision
    try:
        yield
    finally:
        config.decision = before


def inputs_of(batch: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch without its labels, where the model lies; TypeError where it is no dict."""
    if not isinstance(batch, Mapping):  # a tuple above all, as a DataLoader of a TensorDataset yields it
        raise TypeError(f"batches: must be dicts with input_ids and attention_mask, got {type(batch).__name__}")
    return {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
