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
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout
from transkimmer.demo.model import backbone_folder
from transkimmer.tasks import TEXT_TASKS
from transkimmer.training.recipe import MODES

from . import plan, stored
from .options import RESULTS, WORK, setting, speedup
from .table import Table
from .training import Training


def trainings_of(arguments: argparse.Namespace) -> Iterator[Training]:
    """The table, in the order in which it is worked off: seed by seed."""
    settings = tuple(arguments.set)
    for seed in arguments.seeds:
        for task in arguments.tasks:
            for mode in arguments.modes:
                own = () if mode == "dense" else settings
                yield Training(task, mode, seed, arguments.backbone, arguments.name, own, arguments.bf16)


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
        plan.show(left, plan.estimates(left, stored.read(table.results), table.data))
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
