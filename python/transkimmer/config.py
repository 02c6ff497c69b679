"""`SkimConfig`: everything about skimming that is saved with a model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

ATTENTIONS = ("renormalized", "published")
DECISIONS = ("threshold", "sample")


@dataclass
class SkimConfig:
    """How a model decides which tokens to skim, and how it is trained to.

    Args:
        predictor_width: inner width of the skim predictors; None: the model's hidden size (Transkimmer, Eq. 2).
        bias_init: mean of the last bias at initialisation, +bias_init for keep and -bias_init for skim (section 4.2).
        temperature: of the Gumbel softmax in training (Eq. 5); shapes the gradient only, not how often a token is kept.
        skim_weight: the weight lambda of the skim loss, added to the model's own loss in training (Eq. 6).
        decision: at inference, "threshold" keeps a token whose keep probability is at least `threshold`
            (0.5 is the argmax); "sample" draws, as the published code does.
        threshold: keep probability from which a token is kept, strictly between 0 and 1.
        skim_attention: in training, "renormalized" puts the keep weight inside the softmax, so that training computes
            what removal computes; "published" multiplies the attention probabilities, as the published code does.
        schedule: synthetic: the share of a sequence's tokens that each layer works on, instead of the predictors'
            decisions; they still run, so that the time is that of a trained model with these keep ratios.
    """

    predictor_width: int | None = None
    bias_init: float = 5.0
    temperature: float = 1.0
    skim_weight: float = 0.5
    decision: str = "threshold"
    threshold: float = 0.5
    skim_attention: str = "renormalized"
    schedule: list[float] | None = None

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises ValueError naming the first field that is out of range."""

        def need(name: str, fits: bool, allowed: str) -> None:
            if not fits:
                raise ValueError(f"SkimConfig.{name}={getattr(self, name)!r}: must be {allowed}")

        width = self.predictor_width
        need("predictor_width", width is None or (isinstance(width, int) and width > 0), "None or a positive integer")
        need("bias_init", _is_finite(self.bias_init) and self.bias_init >= 0, "a finite number >= 0")
        need("temperature", _is_finite(self.temperature) and self.temperature > 0, "a finite number > 0")
        need("skim_weight", _is_finite(self.skim_weight) and self.skim_weight >= 0, "a finite number >= 0")
        need("decision", self.decision in DECISIONS, f"one of {DECISIONS}")
        need("threshold", _is_finite(self.threshold) and 0 < self.threshold < 1, "strictly between 0 and 1")
        need("skim_attention", self.skim_attention in ATTENTIONS, f"one of {ATTENTIONS}")
        if self.schedule is not None:
            ratios = list(self.schedule)
            need("schedule", all(_is_finite(k) and 0 <= k <= 1 for k in ratios), "None or numbers from 0 to 1")
            need("schedule", ratios == sorted(ratios, reverse=True), "non-increasing: a skimmed token stays skimmed")

    @property
    def logit_threshold(self) -> float:
        """The threshold on the predictors' keep-minus-skim logit."""
        return math.log(self.threshold / (1 - self.threshold))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SkimConfig:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"SkimConfig: unknown fields {unknown}; known are {sorted(known)}")
        return cls(**values)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
