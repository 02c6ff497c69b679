"""The tasks' official metrics, by scikit-learn and SciPy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


def _accuracy(labels: Tensor, predictions: Tensor) -> float:
    return float((labels == predictions).double().mean())


def _f1(labels: Tensor, predictions: Tensor) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels.numpy(), predictions.numpy()))


def _matthews(labels: Tensor, predictions: Tensor) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels.numpy(), predictions.numpy()))


def _pearson(labels: Tensor, predictions: Tensor) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, labels, predictions)


def _spearman(labels: Tensor, predictions: Tensor) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, labels, predictions)


def _correlation(measure: Callable[..., Any], labels: Tensor, predictions: Tensor) -> float:
    """A constant prediction correlates with nothing, and so does a single one, which SciPy may refuse."""
    if labels.numel() < 2:
        return 0.0
    found = float(measure(labels.numpy(), predictions.numpy()).statistic)
    return 0.0 if math.isnan(found) else found


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


def predicted(logits: Tensor) -> Tensor:
    """What logits [rows, outputs] say: int64 classes [rows], or with one output the number itself, fp32 [rows]."""
    return logits[:, 0].float() if logits.size(1) == 1 else logits.argmax(-1)


def score(labels: Tensor, predictions: Tensor, metrics: Iterable[str]) -> dict[str, float]:
    """Metric -> value, each at most 1; labels and predictions [rows], classes or numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant predictions: the value says it
        return {name: METRICS[name](labels.cpu(), predictions.cpu()) for name in metrics}
