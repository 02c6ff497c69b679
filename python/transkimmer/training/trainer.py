"""`SkimTrainer`: a predictor learning rate, a ramp on the skim loss, and distillation from precomputed logits.

A plain `Trainer` trains a skimming model too, since the skim loss is part of the model's loss; these are what make it
train well (see docs/training.md for the measurements).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..config import SkimConfig
from ..losses import unclaimed_penalties
from ..outputs import final_states, in_order, logits_in
from ..records import SkimRecord, record_skimming
from ..skimming import skimming_of
from .curves import follow, is_logged

# Columns of the teacher's logits, and of its final state of the first token, in a training batch.
TEACHER_LOGITS, TEACHER_STATES = "teacher_logits", "teacher_states"
# A logit as good as -inf, whose softmax is 0 and which leaves no NaN in a divergence.
NOWHERE = -1e4

_SHARE: tuple[Callable[[float], bool], str] = (lambda x: 0 <= x <= 1, "lie between 0.0 and 1.0")
_WEIGHT: tuple[Callable[[float], bool], str] = (lambda x: 0 <= x < math.inf, "lie between 0.0 and inf, and be finite")
# Field of `SkimTrainingArguments` -> (what fits, what it must do).
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "predictor_learning_rate": _SHARE,
    "skim_ramp": _SHARE,
    "noise_decay": _SHARE,
    "distillation_weight": _WEIGHT,
    "state_distillation_weight": _WEIGHT,
    "distillation_temperature": (lambda x: 0 < x < math.inf, "be > 0 and finite"),
}


@dataclass
class SkimTrainingArguments(TrainingArguments):
    """`TrainingArguments` and:

    Args:
        predictor_learning_rate: peak learning rate of the skim predictors. They start saturated (`bias_init`), so they
            need a larger one than the backbone; too large, and everything is skimmed before the task can object.
        skim_ramp: share of the steps over which the skim weight rises linearly from 0 to its configured value; with a
            `skim_target`, over which that falls from 1 instead.
        noise_decay: share of the steps, the last ones, over which the noise of the draws falls linearly from its
            configured value to 0, so that the model ends as it will decide. 0: it does not fall.
        distillation_weight: weight of the cross-entropy against the teacher's softened predictions, where batches
            carry a `teacher_logits` column.
        distillation_temperature: softening of both sides.
        state_distillation_weight: weight of the mean squared difference from the teacher's final state of the first
            token, where batches carry a `teacher_states` column: of what a classifying head reads, and richer than the
            predictions of a teacher that is sure of its training rows.
    """

    predictor_learning_rate: float = field(default=2e-4)
    skim_ramp: float = field(default=0.3)
    noise_decay: float = field(default=0.0)
    distillation_weight: float = field(default=1.0)
    distillation_temperature: float = field(default=2.0)
    state_distillation_weight: float = field(default=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (fits, allowed) in _RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                # `TrainingArguments` converts none of its own numbers either.
                hint = " (YAML reads 1e-3 as a string, 1.0e-3 as a number)" if isinstance(value, str) else ""
                raise TypeError(f"{name}={value!r}: must be a number and {allowed}, got {type(value).__name__}{hint}")
            if not fits(float(value)):
                raise ValueError(f"{name}={value!r}: must {allowed}")


class PaddingCollator(DataCollatorWithPadding):
    """Pads inputs and, where they are per token, the teacher's logits, on the right."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        teacher = [torch.tensor(row.pop(TEACHER_LOGITS)) for row in features if TEACHER_LOGITS in row]
        batch = super().__call__(features)
        if teacher:
            longest = max(logits.size(-1) for logits in teacher)
            rows = [F.pad(logits, (0, longest - logits.size(-1)), value=NOWHERE) for logits in teacher]
            batch[TEACHER_LOGITS] = torch.stack(rows)
        return batch


class TrainingDiverged(ValueError):
    """The loss is no longer a finite number."""


class SteadyTrainer(Trainer):
    """`Trainer` that can be resumed to the same result and that stops where the loss is not finite.

    Batches grouped by length are drawn from the seed and the epoch, so that a resumed run sees the same ones.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._epochs = _Epochs()
        super().__init__(*args, **kwargs)
        self.add_callback(self._epochs)
        # Heads of encoders return the mean over a batch, whatever arguments their forward lets through: a sum over all
        # processes and accumulated batches is not what they could divide.
        self.model_accepts_loss_kwargs = False

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        """`Trainer`'s, with steps given as a share of all of them counted out.

        A checkpoint keeps them counted out, so that a resumed `Trainer` would warn of other settings.
        """
        values = super().set_initial_training_values(args, dataloader)
        max_steps = values[-1]
        for name in ("logging_steps", "save_steps"):
            if 0 < (steps := getattr(args, name)) < 1:
                setattr(args, name, math.ceil(max_steps * steps))
        return values

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = self._epochs.sampler = _SeededSampler(sampler.batch_size, lengths=sampler.lengths, seed=seed)
        return sampler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            # Raised before the optimizer's step: neither the weights nor a checkpoint have seen it.
            raise TrainingDiverged(f"the loss is {float(loss)} at step {self.state.global_step + 1}")
        return loss

    @torch.no_grad()
    def check_outcome(self) -> None:
        """TrainingDiverged where the weights of the last step, which no loss has seen, lead to none that is finite."""
        assert self.model is not None
        batch = self._prepare_inputs(next(iter(self.get_eval_dataloader(self.train_dataset))))
        loss = float(cast(Tensor, self.compute_loss(self.model.eval(), batch)))
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss is {loss} after the last step")


class _SeededSampler(LengthGroupedSampler):
    """Groups of similar length, shuffled by seed and epoch alone."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        self.generator.manual_seed(self.seed * 100_003 + self.epoch)
        return super().__iter__()


class _Epochs(TrainerCallback):
    """Tells the sampler its epoch: `Trainer` does not reach it behind the wrappers of a resumed run's processes."""

    sampler: _SeededSampler | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))


class SkimTrainer(SteadyTrainer):
    """Trains a model that `add_skimming` has been called on, and logs what it skims (`SkimCurves.scalars`)."""

    args: SkimTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, SkimTrainingArguments):
            raise TypeError(f"args: must be SkimTrainingArguments, got {type(self.args).__name__}")
        config = skimming_of(self.model).config
        self._schedules = _Schedules(config, self.args.skim_ramp, self.args.noise_decay)
        self.add_callback(self._schedules)
        self.curves = follow(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:  # of a run that was interrupted in the ramp, too: another one takes the configuration for its aim
            self._schedules.restore(skimming_of(self.model).config)

    def _set_signature_columns_if_needed(self) -> None:
        """The teacher's columns are read here and by no model; without this they would be dropped as unused."""
        super()._set_signature_columns_if_needed()
        columns = cast(list[str], self._signature_columns)
        columns += [name for name in (TEACHER_LOGITS, TEACHER_STATES) if name not in columns]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Parameter groups: `Trainer`'s, and predictors, without weight decay, with their own learning rate."""
        if self.optimizer is None:
            optimizer = super().create_optimizer(*args, **kwargs)
            predictors = {id(p): p for p in skimming_of(self.model).predictors.parameters() if p.requires_grad}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in predictors]
            own = {"weight_decay": 0.0, "lr": self.args.predictor_learning_rate}
            optimizer.add_param_group({"params": list(predictors.values()), **own})
        return cast(torch.optim.Optimizer, self.optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        teacher_logits, teacher_states = inputs.pop(TEACHER_LOGITS, None), inputs.pop(TEACHER_STATES, None)
        recording: AbstractContextManager[list[SkimRecord]] = nullcontext([])
        if model.training and is_logged(self.args, self.state):
            recording = record_skimming()
        skimmed = cast(PreTrainedModel, self.model)  # without what runs it on several devices
        watching: AbstractContextManager[list[Tensor]] = nullcontext([])
        if teacher_states is not None:
            watching = final_states(skimmed)
        # Of label smoothing and a loss function of the user's own: the model makes no loss, or one that does not count.
        unclaimed = unclaimed_penalties(all_of_them=self.compute_loss_func is not None)
        with recording as records, watching as states, unclaimed as extra:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if records:
            has_none = self.compute_loss_func is not None or records[-1].skim_loss is None
            added = 0.0 if has_none else skimming_of(self.model).penalty(records).detach()
            self.curves.add(self.state.global_step + 1, records[-1], outputs, added)
        if teacher_logits is not None and model.training:
            apart = distillation_loss(
                logits_in(outputs),
                teacher_logits,
                self.args.distillation_temperature,
                getattr(skimmed.config, "problem_type", None),
            )
            extra.append(self.args.distillation_weight * apart)
        if self.args.state_distillation_weight and teacher_states is None and model.training:
            _warn_of_no_states()
        if teacher_states is not None and model.training:
            first = torch.cat([part[:, 0].to(teacher_states.device) for part in in_order(states)])
            apart = F.mse_loss(first.float(), teacher_states.float())
            extra.append(self.args.state_distillation_weight * apart)
        if extra:
            share = self._share_of_a_step() if model.training else 1.0
            loss = loss + share * torch.stack([part.to(loss.device) for part in extra]).sum()
        return (loss, outputs) if return_outputs else loss

    def _share_of_a_step(self) -> float:
        """What a mean over this batch has to be multiplied by: `Trainer` divides a loss that is a mean by itself."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = self.compute_loss_func is not None
        return 1 / getattr(self, "current_gradient_accumulation_steps", 1) if scaled else 1.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.curves.step == self.state.global_step:
            config = skimming_of(self.model).config
            logs |= {
                "skim_weight": config.skim_weight,
                "skim_target": config.skim_target,
                "noise": config.noise,
                **self.curves.scalars(config.logit_threshold),
            }
        super().log(logs, start_time)


@functools.cache  # once
def _warn_of_no_states() -> None:
    warnings.warn(
        f"state_distillation_weight: is set, but batches have no {TEACHER_STATES!r}; nothing is distilled from states",
        stacklevel=3,
    )


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float, problem_type: str | None = None
) -> Tensor:
    """KL divergence from the teacher's softened predictions, scaled by temperature^2; logits [..., classes].

    The mean over whatever stands before the classes: rows, and of the places of an answer, its start and its end.

    With a single output, or where `problem_type` is "regression", it is the mean squared difference; with
    "multi_label_classification" the cross-entropy of every class by itself.
    """
    if logits.size(-1) == 1 or problem_type == "regression":
        return F.mse_loss(logits.float(), teacher_logits.float())
    if problem_type == "multi_label_classification":
        wanted = torch.sigmoid(teacher_logits.float() / temperature)
        return F.binary_cross_entropy_with_logits(logits.float() / temperature, wanted) * temperature**2
    student = F.log_softmax(logits.float() / temperature, -1).flatten(0, -2)
    teacher = F.log_softmax(teacher_logits.float() / temperature, -1).flatten(0, -2)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2


class _Schedules(TrainerCallback):
    """Raises the skim weight from 0, or lowers the share to aim at from 1: the task is heard before tokens go.

    And lowers the noise of the draws to 0. `restore` makes the configuration what it was again.
    """

    def __init__(self, config: SkimConfig, ramp: float, noise_decay: float) -> None:
        self.weight, self.target, self.noise = config.skim_weight, config.skim_target, config.noise
        self.ramp = ramp
        self.noise_decay = noise_decay

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        ramp_steps, decay_steps = self.ramp * state.max_steps, self.noise_decay * state.max_steps
        risen = 1.0 if ramp_steps <= 0 else min(1.0, state.global_step / ramp_steps)
        left = 1.0 if decay_steps <= 0 else min(1.0, (state.max_steps - 1 - state.global_step) / decay_steps)
        self._set(kwargs["model"], risen, left)

    def restore(self, config: SkimConfig) -> None:
        changed = ("skim_target", self.target) if self.target else ("skim_weight", self.weight)
        for name, value in (("noise", self.noise), changed):
            config.set_for_now(name, value)

    def _set(self, model: nn.Module, risen: float, noise_left: float) -> None:
        config = skimming_of(model).config
        config.set_for_now("noise", noise_left * self.noise)
        if self.target:
            config.set_for_now("skim_target", 1 - risen * (1 - self.target))
        else:
            config.set_for_now("skim_weight", self.weight * risen)
