"""`transkimmer train`: fine-tunes a skimming model on a task, start to finish, in one command."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..architectures import ARCHITECTURES
from ..arguments import MODEL, check_folder, check_least, check_pretrained, option_of
from ..skimming import CONFIG_KEY
from ..tasks import TASKS, task_named
from .recipe import CALIBRATIONS, DENSE_SETTINGS, DENSE_STAGE, DISTILLATION, MODES, Recipe, recipe_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BACKBONE = "bert-base-uncased"
BY_MODE = "the mode's"
# Option -> (type, help, default where it is not `Recipe`'s in every mode).
OPTIONS: dict[str, tuple[type, str, str | None]] = {
    "seed": (int, "of initialisation, order, dropout and draws", None),
    "epochs": (float, "of skimming training", BY_MODE),
    "learning_rate": (float, "peak, of the backbone in skimming training", BY_MODE),
    "predictor_learning_rate": (float, "peak, of the skim predictors", BY_MODE),
    "dense_epochs": (float, "of the dense fine-tune", None),
    "dense_learning_rate": (float, "peak, of the dense fine-tune", None),
    "batch_size": (int, "examples per device and step", None),
    "gradient_accumulation": (int, "steps whose gradients are added up before an update", None),
    "max_length": (
        int,
        "tokens; longer texts are cut, and it is said how many, long passages read in windows",
        "512, SQuAD 384",
    ),
    "doc_stride": (int, "tokens that neighbouring windows on a long passage share (SQuAD)", "128"),
    "skim_weight": (float, "lambda: weight of the skim loss; more skims more", BY_MODE),
    "skim_ramp": (float, "share of the steps over which lambda rises from 0, or with --aim the aim falls", BY_MODE),
    "noise_decay": (float, "share of the steps, the last ones, over which decisions cease to be drawn", None),
    "temperature": (float, "tau, of the Gumbel softmax", BY_MODE),
    "predictor_width": (int, "inner width of the skim predictors", "the hidden size"),
    "bias_init": (float, "mu0: predictors start at +mu0 for keep and -mu0 for skim", BY_MODE),
    "distillation_weight": (float, "weight of the loss against the dense fine-tune's predictions; 0: none", BY_MODE),
    "state_distillation_weight": (float, "weight of the loss against the dense fine-tune's final first state", BY_MODE),
    "flops_speedup": (
        float,
        "calibrate the predictors' last bias on held-out training rows to this FLOPs speedup, at least 1",
        "2.0 in mode corrected, else not calibrated",
    ),
    "held_out": (float, "share of the training rows for calibration, never more than 2000 rows", None),
    "limit": (int, "use N random training rows only, held-out ones included; all development rows are judged", "all"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--data", type=Path, help="folder with the task's official files; default: from the hub")
    parser.add_argument("--backbone", help=f"pretrained encoder: folder or hub name; default: {BACKBONE}")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model, run.json and checkpoints")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="docs/training.md says what each does and takes where an option is not given",
    )
    parser.add_argument("--dense", type=Path, help="start from this dense fine-tune, not from --backbone")
    parser.add_argument(
        "--calibration",
        choices=CALIBRATIONS,
        help="of the predictors' last bias, on held-out rows: to --flops-speedup, to what draws keep, or not at all; "
        "default: speedup where --flops-speedup is given and in mode corrected, else none",
    )
    parser.add_argument(
        "--aim",
        action=argparse.BooleanOptionalAction,
        help="train towards --flops-speedup: the skim loss counts only above the share of tokens that leads to it",
    )
    parser.add_argument("--bf16", action="store_true", default=None, help="autocast to bf16")
    parser.add_argument(
        "--pruned-training",
        action="store_true",
        default=None,
        help="remove skimmed tokens in training, too: less memory, and faster on a CPU",
    )
    parser.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, skimming training by CUDA graphs, unless it is pruned or distributed; default: yes",
    )
    parser.add_argument("--save-steps", type=int, help="steps between checkpoints; default: five checkpoints a stage")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    for name, (kind, text, default) in OPTIONS.items():
        value = Recipe.__dataclass_fields__[name].default
        said = {None: value, BY_MODE: f"{BY_MODE} (corrected: {value})"}.get(default, default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None, help=f"{text}; default: {said}")


def run(arguments: argparse.Namespace) -> int:
    # These need accelerate, which only training does.
    from accelerate import PartialState

    from .output import prepare_output, summary
    from .run import RUN, Run

    task = task_named(arguments.task)
    names = {field.name for field in dataclasses.fields(Recipe)} - {"mode"}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    recipe = recipe_of(arguments.mode, task, **given)
    check_least(arguments, save_steps=1)
    _check_read(recipe, given, arguments.dense)
    recipe.check_speedup(_check_start(recipe, arguments.backbone, arguments.dense))
    backbone = None if arguments.dense is not None else arguments.backbone or BACKBONE
    places = (backbone, arguments.output, arguments.data, arguments.dense)
    job = Run(task, recipe, *places, arguments.save_steps, arguments.cuda_graphs)
    prepare_output(job, arguments.resume)
    document = job.carry_out()
    if PartialState().is_main_process:
        print(summary(document))
        print(f"wrote {arguments.output / RUN}")
    return 0


def _check_start(recipe: Recipe, backbone: str | None, dense: Path | None) -> PreTrainedConfig:
    """Sees to it that there is a dense model to start from, and only one; None: not given. Returns its config."""
    from transformers import AutoConfig

    needed = (*MODEL, "tokenizer")
    if dense is None:
        backbone = BACKBONE if backbone is None else backbone
        check_pretrained("--backbone", backbone, needed)
        config = AutoConfig.from_pretrained(backbone)
        _check_kind(recipe, config, f"--backbone {backbone}", "a dense one")
        return config
    allowed = "a folder with a dense fine-tune"
    check_folder("--dense", str(dense), needed, allowed)
    config = AutoConfig.from_pretrained(dense)
    _check_kind(recipe, config, f"--dense {dense}", allowed)
    if not recipe.warm_start:
        raise ValueError(f"--dense {dense}: --mode {recipe.mode} starts from --backbone; leave it out")
    if backbone is not None:
        raise ValueError(f"--backbone {backbone}: the run starts from --dense {dense}; leave one of them out")
    return config


def _check_kind(recipe: Recipe, config: PreTrainedConfig, given: str, allowed: str) -> None:
    """ValueError where a model with this configuration skims already, or is of a type that cannot be made to."""
    if hasattr(config, CONFIG_KEY):
        raise ValueError(f"{given}: is a skimming model; must be {allowed}")
    if recipe.mode != "dense" and config.model_type not in ARCHITECTURES:
        raise ValueError(f"{given}: is of type {config.model_type!r}; must be one of {', '.join(ARCHITECTURES)}")


def _check_read(recipe: Recipe, given: Mapping[str, Any], dense: Path | None) -> None:
    """Raises ValueError for an option given that this run would not read."""
    for name, value in given.items():
        option = f"{option_of(name)} {value}"
        if recipe.mode == "dense" and name not in DENSE_SETTINGS:
            allowed = ", ".join(mode for mode in MODES if mode != "dense")
            raise ValueError(f"{option}: is of skimming; --mode must be one of {allowed}")
        if name in DENSE_STAGE and dense is not None:
            raise ValueError(f"{option}: is of a dense fine-tune, which --dense {dense} is already; leave it out")
        if (name in DENSE_STAGE or (name in DISTILLATION and value)) and not recipe.warm_start:
            what = "dense fine-tune" if name in DENSE_STAGE else "dense fine-tune to distil from"
            raise ValueError(f"{option}: --mode {recipe.mode} makes no {what}; leave it out")
    if "flops_speedup" in given and not recipe.aim and recipe.calibration != "speedup":
        raise ValueError(
            f"--flops-speedup {recipe.flops_speedup}: is neither aimed at nor calibrated to, without --aim and with "
            f"--calibration {recipe.calibration}; leave it out"
        )
