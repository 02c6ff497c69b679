"""Accuracy against speed on real tasks: trains every configuration of a table and adds its rows to `accuracy.csv`.

    python -m benchmarks.accuracy --data DATA [--tasks mrpc rte] [--modes dense corrected] [--seeds 1 2] [--minutes 60]
    python -m benchmarks.accuracy [--data DATA] --plan    # what is left, and how long it may take
    python -m benchmarks.accuracy --data DATA --time      # adds wall-clock columns where the model was kept (--keep)

DATA holds a folder per task. A dense fine-tune is made once for a task and a seed; skimming trainings start from it.
Of one skimming training there are several rows: decided by argmax, by draws, and with the threshold calibrated to every
one of `--speedups` on held-out training rows. A call that was interrupted is given again and goes on from the last
checkpoint; calls side by side share out the tasks.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transkimmer.bench.results import commit, device_name
from transkimmer.demo.model import backbone_folder
from transkimmer.flops import EncoderShape
from transkimmer.skimming import skimming_of
from transkimmer.tasks import TEXT_TASKS, load_split
from transkimmer.training.evaluation import training_forward_difference
from transkimmer.training.evaluation_command import figures_of, load
from transkimmer.training.kinds import kind_of
from transkimmer.training.output import prepare_output
from transkimmer.training.recipe import MODEL, MODES, SETTINGS, Recipe, recipe_of
from transkimmer.training.run import Run, hold_out

from transkimmer_kernels.files import write_whole

from . import accuracy_plan, accuracy_rows
from .accuracy_curve import calibrated

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/accuracy.csv"
WORK = ROOT / ".benchmarks/accuracy"  # ignored by git
POINTS = "points.json"
# Epochs of (dense fine-tune, skimming training in `corrected`) of backbones up to 512 wide; `paper` and `published`,
# which start from the backbone, take as many as both together.
EPOCHS = {"sst2": (2.0, 3.0)}
SMALL_TASK_EPOCHS = (5.0, 8.0)
TIMES = ("wall_clock_speedup", "skim_efficiency")  # columns of --time
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


class Table:
    """Carries out trainings and keeps their rows."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.data: Path | None = arguments.data
        self.results: Path = arguments.results
        self.work: Path = arguments.work
        self.speedups: list[float] = sorted(arguments.speedups)
        self.keep: bool = arguments.keep

    def row_of(self, training: Training) -> accuracy_rows.Row | None:
        """One of its rows, if it is finished: they are all written in one step."""
        wanted = accuracy_rows.identity(training.columns)
        rows = accuracy_rows.read(self.results)
        return next((row for row in rows if accuracy_rows.identity(row) == wanted), None)

    def finish(self, training: Training) -> None:
        """Trains, measures and adds the rows, or what of it is left."""
        if training.mode == "dense":
            self._finish_dense(training)
            return
        dense = self.work / training.dense.folder / MODEL
        if not dense.is_dir() or self.row_of(training.dense) is None:
            self._finish_dense(training.dense)
        job, document, seconds = self._carry_out(training, dense)
        points = self._points(training, job, document)
        started_from = document.get("dense_dev")  # nothing in modes that start from the backbone
        if started_from is None:
            row = self.row_of(training.dense)
            assert row is not None
            value: Any = row["value"]
        else:
            value = started_from["metrics"][job.task.metric]
        written = [{**point, "dense": value, "seconds_train": seconds} for point in points]
        write_whole(job.output / POINTS, json.dumps(written, indent=2) + "\n")
        self._add(training, written)
        shutil.rmtree(job.output / "skimming", ignore_errors=True)
        if not self.keep:
            shutil.rmtree(job.output)

    def _finish_dense(self, training: Training) -> None:
        job, document, seconds = self._carry_out(training)
        shutil.rmtree(job.output / "dense", ignore_errors=True)
        if self.row_of(training) is not None:  # trained again for the sake of its weights
            return
        model, held_out = self._loaded(job, "held_out")
        task = job.task
        value = document["dense_dev"]["metrics"][task.metric]
        found = job.judged(model, held_out)
        figures = {"dense": value, "value": value, "held_out_value": found.metrics[task.metric], "flops_speedup": 1.0}
        self._add(training, [{**figures, "seconds_train": seconds}])

    def _carry_out(self, training: Training, dense: Path | None = None) -> tuple[Run, dict[str, Any], float | None]:
        """(run, its document, seconds of the training, None where it was resumed)."""
        task, output = TEXT_TASKS[training.task], self.work / training.folder
        warm = training.recipe.warm_start and training.mode != "dense"
        job = Run(task, training.recipe, training.backbone, output, self.data, dense if warm else None)
        resumed = (output / SETTINGS).is_file()
        prepare_output(job, resumed)
        document = job.carry_out()
        return job, document, None if resumed else document["seconds"].get("skimming", document["seconds"].get("dense"))

    def _points(self, training: Training, job: Run, document: dict[str, Any]) -> list[dict[str, Any]]:
        """Points of the accuracy-speed curve of one trained model, first those without calibration."""
        metric = job.task.metric
        model, held_out, dev = self._loaded(job, "held_out", "dev")
        padding = _padding(model, dev.batches, job.task.padded_length)
        points = []

        def add(decision: str, held: dict[str, Any], found: dict[str, Any], **more: Any) -> None:
            speedup = found["flops_speedup"]
            points.append(
                {
                    "decision": decision,
                    "value": found["metrics"][metric],
                    "held_out_value": held["metrics"][metric],
                    "flops_speedup": speedup,
                    "flops_speedup_padded": speedup * padding,
                    "tokens_kept": found["tokens_kept_by_layer"],
                    **more,
                }
            )

        forward = training_forward_difference(model, dev.batches, job.kind.judge(dev.features, model))
        apart = {
            "forward_value": forward.metrics[metric],
            "forward_agreement": forward.agreement,
            "forward_difference": forward.max_difference / forward.max_logit,
        }
        for decision, name in (("argmax", "threshold"), ("sample", "sample")):
            own = apart if decision == "argmax" else {}
            add(decision, document["held_out"][name], document["dev"][name], shift=0.0, **own)
        skimming_of(model).config.decision = "threshold"
        for wanted, shift in calibrated(model, held_out.batches, self.speedups, str(training.folder)):
            held, found = (job.judged(model, rows).to_dict() for rows in (held_out, dev))
            add("threshold", held, found, calibrated_to=wanted, shift=shift)
        return points

    def _loaded(self, job: Run, *splits: str) -> tuple[Any, ...]:
        """(the run's model, each of `splits` as it reads them)."""
        model = load(job.output / MODEL, job.kind)
        tokenizer = AutoTokenizer.from_pretrained(job.output / MODEL)
        found = []
        for split in splits:
            rows = load_split(job.task, "dev" if split == "dev" else "train", self.data)
            rows = hold_out(rows, job.recipe)[1] if split == "held_out" else rows
            found.append(job.rows_of(rows, tokenizer, model.config))
        return model, *found

    def _add(self, training: Training, points: list[dict[str, Any]]) -> None:
        common = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "metric": TEXT_TASKS[training.task].metric,
        }
        accuracy_rows.add(self.results, [{**common, **training.columns, **point} for point in points])

    def add_times(self, training: Training, repeats: int) -> None:
        """Measures the kept model of a finished training against our dense run, in turn, point by point.

        On a GPU both run in bf16, as they would be served there. Rows keep what they say of the training.
        """
        folder = self.work / training.folder
        if training.mode == "dense" or not (folder / POINTS).is_file() or self.row_of(training) is None:
            return
        task, written = TEXT_TASKS[training.task], json.loads((folder / POINTS).read_text(encoding="utf-8"))
        model, dev = self._loaded(Run(task, training.recipe, training.backbone, folder), "dev")
        if torch.cuda.is_available():
            model = model.to(torch.bfloat16)
        config = skimming_of(model).config
        for point in written:
            if point["decision"] != "sample" and "wall_clock_speedup" not in point:
                config.decision = "threshold"
                config.threshold = float(torch.sigmoid(torch.tensor(-point["shift"], dtype=torch.float64)))
                judge = kind_of(task).judge(dev.features, model)
                figures = figures_of(model, task, dev.batches, repeats, judge)
                point |= {name: figures[name] for name in TIMES}
        write_whole(folder / POINTS, json.dumps(written, indent=2) + "\n")
        timed = [{**training.columns, **point} for point in written if TIMES[0] in point]
        accuracy_rows.update(self.results, timed, TIMES)

    def drop_dense(self, training: Training, left: Sequence[Training]) -> None:
        """Removes the weights of a dense fine-tune that no training in `left` starts from."""
        if not self.keep and all(other.dense != training.dense for other in left):
            shutil.rmtree(self.work / training.dense.folder, ignore_errors=True)


def _padding(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]], padded_length: int) -> float:
    """Dense FLOPs on sequences padded to `padded_length` over dense FLOPs without padding."""
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    shape = EncoderShape.of(model.config)
    return shape.dense_flops(lengths.clamp(min=padded_length)) / shape.dense_flops(lengths)


def trainings_of(arguments: argparse.Namespace) -> Iterator[Training]:
    """The table, in the order in which it is worked off: seed by seed."""
    settings = tuple(arguments.set)
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for mode in arguments.modes:
                own = () if mode == "dense" else settings
                yield Training(task, mode, seed, arguments.backbone, arguments.name, own, arguments.bf16)


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name not in {field for field in Recipe.__dataclass_fields__ if field not in ("mode", "seed")}:
        raise argparse.ArgumentTypeError(f"{text}: {name} is no setting of a recipe")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def speedup(text: str) -> float:
    value = float(text)
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number >= 1")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with a folder per task; --plan does without, if need be")
    parser.add_argument("--backbone", help="pretrained encoder, folder or hub name; default: the installed MiniLM")
    parser.add_argument("--name", help="what the rows call the backbone; default: the last part of --backbone")
    parser.add_argument(
        "--tasks", nargs="+", default=["mrpc", "stsb", "cola", "rte"], choices=sorted(TEXT_TASKS), metavar="TASK"
    )
    parser.add_argument("--modes", nargs="+", default=["dense", "corrected", "published"], choices=MODES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--speedups", nargs="+", type=speedup, default=[1.5, 2.0, 2.5, 3.0])
    parser.add_argument("--set", nargs="+", type=setting, default=[], metavar="NAME=VALUE", help="of skimming recipes")
    parser.add_argument("--bf16", action="store_true", help="autocast, where a processor multiplies faster in bf16")
    parser.add_argument("--minutes", type=float, help="start no training after so long")
    parser.add_argument("--plan", action="store_true", help="print what is left, train nothing")
    parser.add_argument("--keep", action="store_true", help="keep the models, for --time")
    parser.add_argument("--time", action="store_true", help="time kept models instead of training")
    parser.add_argument("--repeats", type=int, default=5, help="of the timing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for models and checkpoints")
    arguments = parser.parse_args(argv)
    if arguments.data is None and not arguments.plan:
        parser.error("--data: is needed except for --plan")
    if arguments.backbone is None:
        arguments.backbone, arguments.name = str(backbone_folder()), arguments.name or "all-MiniLM-L6-v2"
    arguments.name = arguments.name or Path(arguments.backbone).name
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    start = time.monotonic()
    arguments = parse(argv)
    table = Table(arguments)
    trainings = list(trainings_of(arguments))
    if arguments.time:
        for training in trainings:
            table.add_times(training, arguments.repeats)
        return
    left = [training for training in trainings if table.row_of(training) is None]
    if arguments.plan:
        accuracy_plan.show(left, accuracy_plan.estimates(left, accuracy_rows.read(table.results), table.data))
        return
    for training in list(left):
        if arguments.minutes is not None and time.monotonic() - start > 60 * arguments.minutes:
            print(f"{len(left)} trainings are left")
            break
        lock = table.work / training.name / f"{training.task}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock, timeout=0):
                if table.row_of(training) is None:
                    table.finish(training)
                left.remove(training)
                table.drop_dense(training, left)
        except Timeout:
            print(f"{training.folder}: another process is at this task")


if __name__ == "__main__":
    main()
