"""`transkimmer train`: fine-tunes a skimming model on a task, start to finish, in one command."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ..tasks import TASKS, task_named
from .recipe import CALIBRATIONS, MODES, Recipe, recipe_of

OPTIONS = {
    "seed": (int, "of initialisation, order, dropout and draws"),
    "epochs": (float, "of skimming training"),
    "learning_rate": (float, "peak, of the backbone in skimming training"),
    "predictor_learning_rate": (float, "peak, of the skim predictors"),
    "dense_epochs": (float, "of the dense fine-tune"),
    "dense_learning_rate": (float, "peak, of the dense fine-tune"),
    "batch_size": (int, "examples per device and step"),
    "gradient_accumulation": (int, "steps whose gradients are added up before an update"),
    "max_length": (int, "tokens; longer texts are cut, and it is said how many, long passages read in windows"),
    "doc_stride": (int, "tokens that neighbouring windows on a long passage share (SQuAD)"),
    "skim_weight": (float, "lambda: weight of the skim loss; more skims more"),
    "skim_ramp": (float, "share of the steps over which lambda rises from 0"),
    "temperature": (float, "tau, of the Gumbel softmax"),
    "predictor_width": (int, "inner width of the skim predictors; the paper's is the hidden size"),
    "bias_init": (float, "mu0: predictors start at +mu0 for keep and -mu0 for skim"),
    "distillation_weight": (float, "weight of the loss against the dense fine-tune's predictions; 0: none"),
    "flops_speedup": (float, "calibrate the threshold on held-out training rows to this FLOPs speedup"),
    "held_out": (float, "share of the training rows for calibration"),
    "limit": (int, "use the first N training rows only (a trial run)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--data", type=Path, help="folder with the task's official files; default: from the hub")
    parser.add_argument("--backbone", default="bert-base-uncased", help="pretrained encoder: folder or hub name")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model, run.json and checkpoints")
    parser.add_argument("--mode", choices=MODES, default=MODES[0], help="docs/training.md says what each does")
    parser.add_argument("--dense", type=Path, help="start from this dense fine-tune instead of making one")
    parser.add_argument("--calibration", choices=CALIBRATIONS, help="how the threshold is set on held-out rows")
    parser.add_argument(
        "--aim",
        action=argparse.BooleanOptionalAction,
        help="train towards --flops-speedup: the skim loss counts only above the share of tokens that leads to it",
    )
    parser.add_argument("--bf16", action="store_true", default=None, help="autocast to bf16")
    parser.add_argument(
        "--pruned-training", action="store_true", default=None, help="remove skimmed tokens in training, too; faster"
    )
    parser.add_argument("--save-steps", type=int, help="steps between checkpoints; default: five checkpoints a stage")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    for name, (kind, text) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=None, help=f"{text}; default: the mode's")


def run(arguments: argparse.Namespace) -> int:
    # These need accelerate, which only training does.
    from accelerate import PartialState

    from .output import prepare_output, summary
    from .run import RUN, Run

    task = task_named(arguments.task)
    names = {field.name for field in dataclasses.fields(Recipe)} - {"mode"}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    recipe = recipe_of(arguments.mode, task, **given)
    if arguments.save_steps is not None and arguments.save_steps < 1:
        raise ValueError(f"--save-steps {arguments.save_steps}: must be at least 1")
    job = Run(task, recipe, arguments.backbone, arguments.output, arguments.data, arguments.dense, arguments.save_steps)
    prepare_output(job, arguments.resume)
    document = job.carry_out()
    if PartialState().is_main_process:
        print(summary(document))
        print(f"wrote {arguments.output / RUN}")
    return 0
