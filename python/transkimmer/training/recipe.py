"""How a model is trained: hyper-parameters, and what each mode takes for those that are not given."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import option_of
from ..config import SkimConfig
from ..data import positions_of
from ..flops import EncoderShape
from ..tasks import QuestionTask, Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Folder of a run, or of one of its stages, that holds the finished model.
MODEL = "model"
SETTINGS = "settings.json"  # of a run, beside it
# dense: no skimming, the baseline. The others: docs/training.md.
MODES = ("corrected", "paper", "published", "dense")
CALIBRATIONS = ("speedup", "sampled", "none")
# Of these, what makes the dense fine-tune that a run starts from, and what is learned from that.
DENSE_STAGE = ("dense_epochs", "dense_learning_rate")
DISTILLATION = ("distillation_weight", "state_distillation_weight")
# Settings that a dense fine-tune reads; all others are of skimming.
DENSE_SETTINGS = {
    *("seed", *DENSE_STAGE, "batch_size", "gradient_accumulation", "warmup", "weight_decay", "max_grad_norm"),
    *("max_length", "doc_stride", "bf16", "held_out", "limit"),
}


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a run.

    Attributes:
        warm_start: skimming training starts from the dense fine-tune, else from the pretrained backbone.
        skim_ramp, noise_decay, distillation_weight, state_distillation_weight, predictor_learning_rate: as in
            `SkimTrainingArguments`.
        predictor_width, bias_init, temperature, skim_weight, skim_attention, pruned_training, decision: as in
            `SkimConfig`.
        aim: whether the skim loss counts only above the share of tokens that about leads to `flops_speedup`
            (`SkimConfig.skim_target`).
        warmup: share of the steps over which learning rates rise.
        max_grad_norm: gradients are clipped to it; 0: not at all.
        doc_stride: as in `QuestionWindows`; None: the task's texts are not read in windows.
        calibration: "speedup": the predictors' last bias is shifted to `flops_speedup` on held-out rows; "sampled": to
            the speedup that draws have there; "none": not at all.
        held_out: share of the training rows that only calibration sees, at most `run.HELD_OUT_AT_MOST` rows.
        limit: so many training rows are used, drawn at random, held-out ones included (a trial run).
    """

    mode: str
    seed: int = 42
    dense_epochs: float = 3.0
    dense_learning_rate: float = 5e-5
    warm_start: bool = True
    epochs: float = 5.0
    learning_rate: float = 3e-5
    predictor_learning_rate: float = 3e-4
    batch_size: int = 32
    gradient_accumulation: int = 1
    warmup: float = 0.06
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_length: int = 512
    doc_stride: int | None = None
    bf16: bool = False
    predictor_width: int | None = None
    bias_init: float = 3.0
    temperature: float = 1.0
    skim_weight: float = 4.0
    aim: bool = True
    skim_ramp: float = 0.4
    noise_decay: float = 0.0
    distillation_weight: float = 1.0
    state_distillation_weight: float = 5.0
    skim_attention: str = "renormalized"
    pruned_training: bool = False
    decision: str = "threshold"
    calibration: str = "speedup"
    flops_speedup: float = 2.0
    held_out: float = 0.1
    limit: int | None = None

    def check(self) -> None:
        """Raises ValueError naming the first option that is out of range."""
        for name in ("dense_epochs", "epochs", "dense_learning_rate", "learning_rate", "predictor_learning_rate"):
            self._need(name, _positive(getattr(self, name)), "a finite number > 0")
        self._need("predictor_learning_rate", self.predictor_learning_rate <= 1, "at most 1")
        for name in ("batch_size", "gradient_accumulation"):
            self._need(name, getattr(self, name) >= 1, "at least 1")
        self._need("seed", 0 <= self.seed < 2**32, "from 0 to 2^32 - 1")
        self._need("max_length", self.max_length >= 4, "at least 4")
        self._need("doc_stride", self.doc_stride is None or self.doc_stride >= 0, "at least 0")
        self._need("limit", self.limit is None or self.limit >= 4, "at least 4")
        self._need("held_out", 0 < self.held_out < 1, "strictly between 0 and 1")
        for name in ("skim_ramp", "noise_decay"):
            self._need(name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        self._need("flops_speedup", math.isfinite(x := self.flops_speedup) and x >= 1, "a finite number >= 1")
        for name in ("distillation_weight", "state_distillation_weight"):
            self._need(name, math.isfinite(weight := getattr(self, name)) and weight >= 0, "a finite number >= 0")
        self._need("calibration", self.calibration in CALIBRATIONS, f"one of {CALIBRATIONS}")
        if self.mode != "dense":
            self.skim_config()

    def _need(self, name: str, fits: bool, allowed: str) -> None:
        if not fits:
            raise ValueError(f"{option_of(name)} {getattr(self, name)}: must be {allowed}")

    def skim_config(self, shape: EncoderShape | None = None) -> SkimConfig:
        """Raises ValueError where a field is out of range. shape: of the encoder, where the recipe aims."""
        names = ("predictor_width", "bias_init", "temperature", "skim_weight", "skim_attention", "pruned_training")
        config = SkimConfig(decision=self.decision, **{name: getattr(self, name) for name in names})
        if self.aim and shape is not None:
            config.skim_target = shape.share_at(self.flops_speedup)
        return config

    def longest(self, config: PreTrainedConfig) -> int:
        """Tokens that texts are cut to: `max_length`, but no more than fit the model.

        Raises ValueError where more were asked for than fit; the defaults are for models with fewer positions, too.
        """
        positions = positions_of(config)
        fits = self.max_length <= positions or self.max_length in (Recipe.max_length, QuestionTask.max_length)
        self._need("max_length", fits, f"at most {positions}, the positions that the model has")
        return min(self.max_length, positions)

    def check_speedup(self, config: PreTrainedConfig, held_out: Tensor | None = None) -> None:
        """ValueError where a model with this configuration cannot reach `flops_speedup`, and the run is for that.

        held_out: int64 [rows], tokens of the rows that are calibrated on; None: not known, perhaps the longest ones.
        """
        if self.mode == "dense" or not (self.calibration == "speedup" or (self.aim and held_out is None)):
            return
        longest, width = self.longest(config), self.predictor_width or config.hidden_size
        texts = f"texts of {longest} tokens (--max-length)" if held_out is None else "the held-out rows"
        lengths = torch.tensor([longest]) if held_out is None else held_out
        most = max(1.0, EncoderShape.of(config, width).most_flops_speedup(lengths))
        allowed = f"at most {math.floor(100 * most) / 100:.2f}"  # which is itself allowed
        why = f"which one token per layer and the predictors (--predictor-width {width}) lead to on {texts}"
        self._need("flops_speedup", self.flops_speedup <= most, f"{allowed}, {why}")

    @property
    def distils(self) -> bool:
        return self.distillation_weight > 0 or self.state_distillation_weight > 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def recipe_of(mode: str, task: Task, **given: Any) -> Recipe:
    """The mode's recipe for a task; options that are given and not None go before the mode's own.

    "paper" follows the paper's text, as far as it says anything: temperature 0.1, one learning rate, the paper's skim
    weight, tokens removed at inference where argmax says so. "published" computes what the published code does:
    temperature 1, attention that is not renormalised, decisions drawn at inference. docs/training.md says where its
    scripts have other hyper-parameters.
    """
    if mode not in MODES:
        raise ValueError(f"--mode {mode}: must be one of {', '.join(MODES)}")
    own: dict[str, Any] = {}
    if isinstance(task, QuestionTask):
        # A head that reads every state is not held to the first one.
        own = {"max_length": task.max_length, "doc_stride": task.doc_stride, "state_distillation_weight": 0.0}
    elif given.get("doc_stride") is not None:
        raise ValueError(f"--doc-stride {given['doc_stride']}: is for questions; {task.title} is not read in windows")
    if mode in ("paper", "published"):
        rate = task.paper_learning_rate
        own |= {
            "warm_start": False,
            "epochs": float(task.paper_epochs),
            "learning_rate": rate,
            "predictor_learning_rate": given.get("learning_rate") or rate,
            "warmup": 0.0,
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
            "bias_init": 5.0,
            "temperature": 0.1 if mode == "paper" else 1.0,
            "skim_weight": task.paper_skim_weight,
            "aim": False,
            "skim_ramp": 0.0,
            "noise_decay": 0.0,
            "distillation_weight": 0.0,
            "state_distillation_weight": 0.0,
            "calibration": "none",
        }
        if mode == "published":
            own |= {"skim_attention": "published", "decision": "sample"}
    given = {name: value for name, value in given.items() if value is not None}
    if mode == "published" and given.get("pruned_training"):
        raise ValueError(
            "--pruned-training: does not go with --mode published, where skimmed tokens count in the softmax to the end"
        )
    if "flops_speedup" in given:
        own["calibration"] = "speedup"
    recipe = Recipe(mode, **own | given)
    recipe.check()
    return recipe
