"""Trials of skimming recipes that look at held-out training rows only: what settings were chosen by.

    python -m benchmarks.accuracy.trials --data DATA --task stsb --dense FOLDER --set aim=true skim_weight=4 [--seed 1]

Starts from a dense fine-tune that `benchmarks.accuracy --keep` has left, and adds the points of one skimming training
to `accuracy-trials.csv`: decided by draws, by argmax, and with the threshold calibrated to every one of `--speedups`.
The development rows are not read.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoTokenizer, PreTrainedModel
from transkimmer.bench.results import commit, device_name
from transkimmer.skimming import skimming_of
from transkimmer.tasks import TEXT_TASKS, load_split
from transkimmer.training.kinds import Rows
from transkimmer.training.output import prepare_output
from transkimmer.training.recipe import SETTINGS, recipe_of
from transkimmer.training.run import Run, hold_out

from transkimmer_kernels.files import write_whole

from .curve import calibrated
from .options import ROOT, WORK, setting, speedup

RESULTS = ROOT / "benchmarks/results/accuracy-trials.csv"
# settings: JSON, of the recipe, besides those of mode corrected; value, dense: of the trained model and of the dense
# fine-tune that it started from, both on held-out rows.
COLUMNS = (
    *("date", "commit", "device", "task", "seed", "settings", "decision", "calibrated_to", "metric"),
    *("dense", "value", "flops_speedup", "tokens_kept", "seconds_train"),
)


def points(job: Run, speedups: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Trains, and yields the columns of every point of the curve."""
    tokenizer = AutoTokenizer.from_pretrained(job.dense)
    train, held_out = hold_out(load_split(job.task, "train", job.data), job.recipe)
    model = job.dense_model(train, tokenizer)
    rows = job.rows_of(held_out, tokenizer, model.config)
    dense = job.judged(model, rows).metrics[job.task.metric]
    start = time.perf_counter()
    model = job.skimming_model(model, train, tokenizer)
    common = {"dense": dense, "seconds_train": round(time.perf_counter() - start)}
    config = skimming_of(model).config
    for decision in ("sample", "threshold"):
        config.decision = decision
        yield {**common, "decision": {"threshold": "argmax"}.get(decision, decision), **_columns(job, model, rows)}
    for wanted, _ in calibrated(model, rows.batches, speedups, job.task.name):
        yield {**common, "decision": "threshold", "calibrated_to": wanted, **_columns(job, model, rows)}


def _columns(job: Run, model: PreTrainedModel, rows: Rows) -> dict[str, Any]:
    torch.manual_seed(job.recipe.seed)
    found = job.judged(model, rows)
    return {
        "value": round(found.metrics[job.task.metric], 6),
        "flops_speedup": round(found.flops_speedup, 4),
        "tokens_kept": json.dumps([round(share, 4) for share in found.tokens_kept_by_layer]),
    }


def add(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows in one step."""
    with FileLock(f"{path}.lock"):
        before = path.read_text(encoding="utf-8") if path.is_file() else ",".join(COLUMNS) + "\n"
        text = io.StringIO()
        csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
        write_whole(path, before + text.getvalue())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.accuracy.trials", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder per task")
    parser.add_argument("--task", required=True, choices=sorted(TEXT_TASKS), metavar="TASK")
    parser.add_argument("--dense", type=Path, required=True, help="folder of the dense fine-tune to start from")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", nargs="+", type=setting, default=[], metavar="NAME=VALUE", help="of the recipe")
    parser.add_argument("--speedups", nargs="+", type=speedup, default=[1.5, 2.0, 2.5])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=WORK.with_name("trials"), help="folder for checkpoints")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    task, settings = TEXT_TASKS[arguments.task], dict(sorted(arguments.set))
    recipe = recipe_of("corrected", task, **{"seed": arguments.seed, "calibration": "none", **settings})
    name = ",".join(f"{key}={value}" for key, value in settings.items())
    folder = arguments.work / task.name / f"{name or 'corrected'},seed={arguments.seed}"
    job = Run(task, recipe, str(arguments.dense), folder, arguments.data, arguments.dense)
    prepare_output(job, resume=(folder / SETTINGS).is_file())
    common = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "task": task.name,
        "seed": arguments.seed,
        "settings": json.dumps(settings),
        "metric": task.metric,
    }
    add(arguments.results, [common | point for point in points(job, sorted(arguments.speedups))])
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
