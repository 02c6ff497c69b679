"""One stage of training, dense or skimming: `Trainer` set up, resumed where it was left, its model kept whole."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_callback import TrainerState

from ..data import Features
from .recipe import Recipe
from .trainer import PaddingCollator, SkimTrainer, SkimTrainingArguments, SteadyTrainer, TrainingDiverged

CHECKPOINTS = 5  # per stage; only the last is kept
STATE = "trainer_state.json"
GO_ON = "go on with --resume (train-demo: run it again)"


def train_stage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Features,
    recipe: Recipe,
    folder: Path,
    *,
    skimming: bool,
    save_steps: int | None = None,
) -> PreTrainedModel:
    """Trains `model` on `examples`, from the last whole checkpoint in `folder` where there is one.

    Raises:
        ValueError: the loss is not finite any more; what checkpoint is left is said.
        OSError: nothing can be written to `folder`.
    """
    trainer_class: type[SteadyTrainer] = SkimTrainer if skimming else SteadyTrainer
    trainer = trainer_class(
        model=model,
        args=_arguments(recipe, folder, skimming, save_steps),
        train_dataset=examples,
        data_collator=PaddingCollator(tokenizer),
        processing_class=tokenizer,
    )
    checkpoint = last_whole_checkpoint(folder)
    name = "skimming" if skimming else "dense"
    finished = False
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_state()  # the curves, which the checkpoints take with them when they go
        finished = True
        trainer.check_outcome()
    except TrainingDiverged as error:
        kept = None if finished else last_whole_checkpoint(folder)
        raise ValueError(
            f"{name} training stopped: {error}. "
            + (f"The last good checkpoint is {kept}; " if kept else "There is no good checkpoint; ")
            + f"try a lower --{'' if skimming else 'dense-'}learning-rate, in another --output"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        if _is_disk_error(error):
            raise OSError(f"{folder}: a checkpoint could not be written ({error}); {GO_ON}") from error
        raise
    return model.eval()


def save_whole(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves both to `folder` in one step, by the main process; the others wait."""
    state = PartialState()
    if state.is_main_process:
        partial, former = (folder.with_name(f"{folder.name}.{what}") for what in ("partial", "former"))
        try:
            shutil.rmtree(partial, ignore_errors=True)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            shutil.rmtree(former, ignore_errors=True)
            if folder.exists():  # there until the other one is
                os.replace(folder, former)
            os.replace(partial, folder)
            shutil.rmtree(former, ignore_errors=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            if former.exists() and not folder.exists():
                os.replace(former, folder)
            shutil.rmtree(partial, ignore_errors=True)
            if not _is_disk_error(error):
                raise
            raise OSError(f"{folder}: the model could not be written ({error}); {GO_ON}") from error
    state.wait_for_everyone()


def drop_checkpoints(folder: Path) -> None:
    if PartialState().is_main_process:
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end: its state is what `Trainer` writes last."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    return next((path for path in found if _has_state(path)), None)


def logged(folder: Path) -> list[dict[str, float]]:
    """What a finished stage has logged, step by step; nothing where it was not run here."""
    state = folder / STATE
    return TrainerState.load_from_json(str(state)).log_history if state.is_file() else []


def _has_state(checkpoint: Path) -> bool:
    try:
        return TrainerState.load_from_json(str(checkpoint / STATE)).global_step > 0
    except (OSError, json.JSONDecodeError):
        return False


def _is_disk_error(error: BaseException) -> bool:
    """Whether a file could not be written, in the words of whoever wrote it: torch, safetensors."""
    if isinstance(error, OSError):
        return True
    text = f"{error} {error.__context__}".lower()
    words = ("no space", "write", "os error", "i/o error", "input/output error", "read-only", "quota", "iostream error")
    return any(word in text for word in words)


def _arguments(recipe: Recipe, folder: Path, skimming: bool, save_steps: int | None) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": recipe.seed,
        "learning_rate": recipe.learning_rate if skimming else recipe.dense_learning_rate,
        "num_train_epochs": recipe.epochs if skimming else recipe.dense_epochs,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "train_sampling_strategy": "group_by_length",
        "lr_scheduler_type": "linear",
        "warmup_steps": recipe.warmup,  # below 1 a share of the steps
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "bf16": recipe.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 0.05,
        "save_strategy": "steps",
        "save_steps": save_steps or 1 / CHECKPOINTS,
        "save_total_limit": 1,
        "report_to": ["tensorboard"] if importlib.util.find_spec("tensorboard") else [],
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    if not skimming:
        return TrainingArguments(**options)
    return SkimTrainingArguments(
        **options,
        predictor_learning_rate=recipe.predictor_learning_rate,
        skim_ramp=recipe.skim_ramp,
        noise_decay=recipe.noise_decay,
        distillation_weight=recipe.distillation_weight,
        state_distillation_weight=recipe.state_distillation_weight,
    )
