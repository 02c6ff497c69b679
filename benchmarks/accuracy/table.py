"""Carries out the trainings of the table, measures the models, and keeps the rows."""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transkimmer.bench.results import commit
from transkimmer.flops import EncoderShape
from transkimmer.skimming import skimming_of
from transkimmer.tasks import TEXT_TASKS, load_split
from transkimmer.training.evaluation import training_forward_difference
from transkimmer.training.evaluation_command import figures_of, load
from transkimmer.training.kinds import kind_of
from transkimmer.training.output import prepare_output
from transkimmer.training.recipe import MODEL, SETTINGS
from transkimmer.training.run import Run, hold_out

from transkimmer_kernels.files import write_whole

from . import stored
from .curve import calibrated
from .training import Training

POINTS = "points.json"
TIMES = ("wall_clock_speedup", "skim_efficiency")  # columns of --time


class Table:
    """Carries out trainings and keeps their rows."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.data: Path | None = arguments.data
        self.results: Path = arguments.results
        self.work: Path = arguments.work
        self.speedups: list[float] = sorted(arguments.speedups)
        self.keep: bool = arguments.keep

    def row_of(self, training: Training) -> stored.Row | None:
        """One of its rows, if it is finished: they are all written in one step."""
        wanted = stored.identity(training.columns)
        rows = stored.read(self.results)
        return next((row for row in rows if stored.identity(row) == wanted), None)

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
        stored.add(self.results, [{**common, **training.columns, **point} for point in points])

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
        stored.update(self.results, timed, TIMES)

    def drop_dense(self, training: Training, left: Sequence[Training]) -> None:
        """Removes the weights of a dense fine-tune that no training in `left` starts from."""
        if not self.keep and all(other.dense != training.dense for other in left):
            shutil.rmtree(self.work / training.dense.folder, ignore_errors=True)


def _padding(model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]], padded_length: int) -> float:
    """Dense FLOPs on sequences padded to `padded_length` over dense FLOPs without padding."""
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    shape = EncoderShape.of(model.config)
    return shape.dense_flops(lengths.clamp(min=padded_length)) / shape.dense_flops(lengths)
