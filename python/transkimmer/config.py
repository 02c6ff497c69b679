"""`SkimConfig`: everything about skimming that is saved with a model."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

ATTENTIONS = ("renormalized", "published")
DECISIONS = ("threshold", "sample")


@dataclass
class SkimConfig:
    """How a model decides which tokens to skim, and how it is trained to.

    Args:
        predictor_width: inner width of the skim predictors; None: the model's hidden size (Transkimmer, Eq. 2).
        bias_init: mean of the last bias at initialisation, +bias_init for keep and -bias_init for skim (section 4.2).
        temperature: of the Gumbel softmax in training (Eq. 5); shapes the gradient only, not how often a token is kept.
        noise: in training, what the noise of the draws is multiplied by. 1: P(keep) is the sigmoid of the logit; 0: no
            draws, tokens are kept as inference keeps them at threshold 0.5.
        skim_weight: the weight lambda of the skim loss, added to the model's own loss in training (Eq. 6).
        skim_target: in training, the share of a batch's tokens, mean over layers, up to which skimming costs nothing:
            lambda weighs what the skim loss has above it. 0: all of it, as in the paper.
        decision: at inference, "threshold" keeps a token whose keep probability is at least `threshold`
            (0.5 is the argmax); "sample" draws, as the published code does.
        threshold: keep probability from which a token is kept, strictly between 0 and 1; in draws the one at which a
            token is kept as often as not.
        skim_attention: in training, "renormalized" puts the keep weight inside the softmax, so that training computes
            what removal computes; "published" multiplies the attention probabilities, as the published code does.
        pruned_training: also removes skimmed tokens in training, after the layer that skims them: the same values for
            less work, but later layers no longer tell a decision what it has cost. Not with "published" attention,
            where skimmed tokens count in the softmax to the end.
        schedule: synthetic: the share of a sequence's tokens that each layer works on, instead of the predictors'
            decisions; they still run, so that the time is that of a trained model with these keep ratios.
    """

    predictor_width: int | None = None
    bias_init: float = 5.0
    temperature: float = 1.0
    noise: float = 1.0
    skim_weight: float = 0.5
    skim_target: float = 0.0
    decision: str = "threshold"
    threshold: float = 0.5
    skim_attention: str = "renormalized"
    pruned_training: bool = False
    schedule: list[float] | None = None

    # Of the models that the configuration belongs to; set by `add_skimming`.
    _layers: ClassVar[int | None] = None
    _saved: ClassVar[tuple[dict[str, Any], ...]] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses a value out of range, as `check` does: a live model reads its fields at every forward."""
        if name not in _RANGES:
            raise AttributeError(f"SkimConfig.{name}: unknown field; known are {sorted(_fields())}")
        self.set_for_now(name, value)
        for saved in self._saved:
            saved[name] = copy.copy(value)

    def set_for_now(self, name: str, value: Any) -> None:
        """Sets a field of the live model as an assignment does, but not what is saved with it."""
        _check_field(name, value, self._layers)
        self._check_together(name, value)
        object.__setattr__(self, name, value)

    def check(self) -> None:
        """Raises ValueError naming the first field that is out of range."""
        for name in _fields():
            _check_field(name, getattr(self, name), self._layers)

    def _check_together(self, name: str, value: Any) -> None:
        """ValueError if `value`, which field `name` is to take, does not go with the other fields or the model."""
        if name == "predictor_width" and self._saved and value != self.predictor_width:
            raise ValueError(
                f"SkimConfig.predictor_width={value!r}: the model has its predictors; must stay {self.predictor_width}"
            )
        both = {"pruned_training": self.pruned_training, "skim_attention": self.skim_attention} | {name: value}
        if both["pruned_training"] and both["skim_attention"] == "published":
            raise ValueError(
                f"SkimConfig.{name}={value!r}: pruned_training=True does not go with skim_attention='published', where "
                "skimmed tokens count in the softmax to the end; it must be 'renormalized'"
            )

    def bind(self, layers: int) -> dict[str, Any]:
        """From now on a schedule must have a ratio for each of `layers` layers; ValueError where it has not.

        Returns what a model saves, which follows every assignment from now on.
        """
        _check_field("schedule", self.schedule, layers)
        object.__setattr__(self, "_layers", layers)
        object.__setattr__(self, "_saved", (*self._saved, self.to_dict()))
        return self._saved[-1]

    def release(self, saved: dict[str, Any] | None) -> None:
        """Takes `bind` back: a model without skimming saves nothing, and a schedule may be of any number of layers."""
        object.__setattr__(self, "_layers", None)
        object.__setattr__(self, "_saved", tuple(other for other in self._saved if other is not saved))

    def __copy__(self) -> SkimConfig:
        """A copy that belongs to no model."""
        return dataclasses.replace(self, schedule=copy.copy(self.schedule))

    def __deepcopy__(self, memo: dict[int, Any]) -> SkimConfig:
        """As part of a model's copy it belongs to that model, by itself to none."""
        if not memo:
            return copy.copy(self)
        memo[id(self)] = made = object.__new__(type(self))
        for name, value in vars(self).items():
            object.__setattr__(made, name, copy.deepcopy(value, memo))
        return made

    @property
    def logit_threshold(self) -> float:
        """The threshold on the predictors' keep-minus-skim logit."""
        return math.log(self.threshold / (1 - self.threshold))

    def penalty(self, skim_loss: Tensor) -> Tensor:
        """The term added to the model's loss; skim_loss: share of the tokens that layers worked on, a scalar."""
        return self.skim_weight * (skim_loss - self.skim_target).clamp(min=0)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SkimConfig:
        known = _fields()
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"SkimConfig: unknown fields {unknown}; known are {sorted(known)}")
        return cls(**values)


def _fields() -> list[str]:
    return [field.name for field in dataclasses.fields(SkimConfig)]


def _check_field(name: str, value: Any, layers: int | None) -> None:
    """ValueError if `value` is out of range for field `name`; layers: of the model, None where it is not known."""
    fits, allowed = _RANGES[name]
    if not fits(value):
        raise ValueError(f"SkimConfig.{name}={value!r}: must be {allowed}")
    if name != "schedule" or value is None:
        return
    if list(value) != sorted(value, reverse=True):
        raise ValueError(f"SkimConfig.schedule={value!r}: must be non-increasing: a skimmed token stays skimmed")
    if layers is not None and len(value) != layers:
        raise ValueError(f"SkimConfig.schedule: has {len(value)} ratios, but the model has {layers} layers")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_schedule(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_finite(ratio) and 0 <= ratio <= 1 for ratio in value)


# Field -> (what fits, in words).
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "predictor_width": (lambda x: x is None or (type(x) is int and x > 0), "None or a positive integer"),
    "bias_init": (lambda x: _is_finite(x) and x >= 0, "a finite number >= 0"),
    "temperature": (lambda x: _is_finite(x) and x > 0, "a finite number > 0"),
    "noise": (lambda x: _is_finite(x) and x >= 0, "a finite number >= 0"),
    "skim_weight": (lambda x: _is_finite(x) and x >= 0, "a finite number >= 0"),
    "skim_target": (lambda x: _is_finite(x) and 0 <= x <= 1, "a number from 0 to 1"),
    "decision": (lambda x: x in DECISIONS, f"one of {DECISIONS}"),
    "threshold": (lambda x: _is_finite(x) and 0 < x < 1, "strictly between 0 and 1"),
    "skim_attention": (lambda x: x in ATTENTIONS, f"one of {ATTENTIONS}"),
    "pruned_training": (lambda x: type(x) is bool, "True or False"),
    "schedule": (lambda x: x is None or _is_schedule(x), "None or numbers from 0 to 1"),
}
