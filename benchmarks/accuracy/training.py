"""One model to train for the table, and the settings that its backbone's size asks for."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transkimmer.bench.results import device_name
from transkimmer.tasks import TEXT_TASKS
from transkimmer.training.recipe import Recipe, recipe_of

# Epochs of (dense fine-tune, skimming training in `corrected`) of backbones up to 512 wide; `paper` and `published`,
# which start from the backbone, take as many as both together.
EPOCHS = {"sst2": (2.0, 3.0)}
SMALL_TASK_EPOCHS = (5.0, 8.0)
# Settings that have a column of their own; others are named in the column `mode`.
OWN_COLUMNS = {"skim_weight": "skim_weight", "pruned_training": "pruned"}


@dataclass(frozen=True)
class Training:
    """One model to train. name: what rows call the backbone; settings: of the recipe, besides the mode's own.

    bf16: autocast, which is a matter of time: it does not tell one training from another.
    """

    task: str
    mode: str
    seed: int
    backbone: str
    name: str
    settings: tuple[tuple[str, Any], ...] = ()
    bf16: bool = False

    @functools.cached_property
    def recipe(self) -> Recipe:
        given = {"seed": self.seed, "calibration": "none", "bf16": self.bf16}
        given |= size_settings(self.backbone, self.mode, self.task)
        return recipe_of(self.mode, TEXT_TASKS[self.task], **given | dict(self.settings))

    @property
    def columns(self) -> dict[str, Any]:
        """What the rows say of the training."""
        skims = self.mode != "dense"
        other = [f"{key}={value}" for key, value in self.settings if key not in OWN_COLUMNS]
        return {
            **{"task": self.task, "backbone": self.name, "mode": " ".join([self.mode, *other]), "seed": self.seed},
            **{column: getattr(self.recipe, key) if skims else None for key, column in OWN_COLUMNS.items()},
            "bf16": self.recipe.bf16,
            "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        }

    @property
    def folder(self) -> Path:
        """Below the work folder."""
        columns = self.columns
        parts = [columns["mode"].replace(" ", ","), f"seed{self.seed}"]
        parts += [f"{column}={columns[column]}" for column in OWN_COLUMNS.values() if columns[column]]
        return Path(self.name, self.task, "-".join(parts))

    @property
    def dense(self) -> Training:
        """The dense fine-tune that it is compared with, and that it may start from."""
        return dataclasses.replace(self, mode="dense", settings=())


@functools.cache
def size_settings(backbone: str, mode: str, task: str) -> dict[str, Any]:
    """Settings for the backbone's size: small ones are trained longer, with higher rates (docs/training.md)."""
    width = AutoConfig.from_pretrained(backbone).hidden_size
    if width > 512:
        return {}
    dense_epochs, epochs = EPOCHS.get(task, SMALL_TASK_EPOCHS)
    if mode in ("paper", "published"):
        return {"learning_rate": 1e-4, "epochs": dense_epochs + epochs}
    settings: dict[str, Any] = {"dense_learning_rate": 1e-4, "dense_epochs": dense_epochs}
    if mode == "corrected":
        settings |= {"learning_rate": 1e-4, "predictor_learning_rate": 1e-3, "epochs": epochs}
        settings |= {"predictor_width": width // 4, "pruned_training": True}
    return settings
