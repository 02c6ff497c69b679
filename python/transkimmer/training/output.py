"""A run's folder before it, and its figures after it."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from transkimmer_kernels.files import write_whole

from ..tasks import task_named
from .recipe import MODEL, SETTINGS, Recipe
from .run import RUN, Run

# What a run writes besides its settings, and replaces.
WRITTEN = (MODEL, "dense", "skimming", RUN)


def prepare_output(job: Run, resume: bool, option: str = "--output") -> None:
    """Makes the output folder, and sees to it that it holds this run or none; of several processes the main one does.

    Args:
        option: that names the folder.

    Raises in every process:
        ValueError: it holds a run and `resume` is False, a run with other settings, or none and `resume` is True; or
            what is no run's, and would be replaced, or what this run starts from; another process's run is under way.
        OSError: it cannot be written.
    """
    state = PartialState(cpu=not torch.cuda.is_available())  # on a CPU it counts processes only when told so
    problem: list[Exception | None] = [None]
    if state.is_main_process:
        try:
            _prepare(job, resume, option)
        except (OSError, ValueError) as error:
            problem = [error]
    if state.num_processes > 1:
        broadcast_object_list(problem)
    if problem[0] is not None:
        raise problem[0]


def _prepare(job: Run, resume: bool, option: str) -> None:
    for start, place in (("--dense", job.dense), ("--backbone", job.backbone)):
        written = [job.output.resolve() / name for name in WRITTEN]
        if place is not None and any(Path(place).resolve().is_relative_to(path) for path in written):
            raise ValueError(f"{start} {place}: lies in {option} {job.output}, where the run writes; take another")
    settings = json.loads(json.dumps(job.settings()))
    saved = job.output / SETTINGS
    if saved.is_file() and any(path != saved for path in job.output.iterdir()):  # else it failed before it trained
        former = json.loads(saved.read_text(encoding="utf-8"))
        if not resume:
            raise ValueError(f"{option} {job.output}: holds a run already; go on with --resume, or take another folder")
        # A setting that did not exist when the run was begun had its default.
        former["recipe"] = Recipe(job.recipe.mode).to_dict() | former["recipe"]
        # Once the hub had no name here, and a backbone stood beside a dense fine-tune that came in its place.
        former["data"] = former["data"] or job.task.hub_name
        former["backbone"] = None if former["dense"] else former["backbone"]
        if former != settings:
            raise ValueError(
                f"{option} {job.output}: holds a run with other settings: {_difference(former, settings)}; "
                "take another folder, or these settings"
            )
        _claim(job, option)
        return
    if resume and not saved.is_file():  # perhaps mistyped: starting anew would take hours
        what = "holds no run" if job.output.is_dir() else "no such folder"
        raise ValueError(f"--resume: {option} {job.output}: {what}; leave out --resume to start one there")
    taken = [name for name in WRITTEN if (job.output / name).exists()]
    if taken and not saved.is_file():
        raise ValueError(
            f"{option} {job.output}: holds {', '.join(taken)} but no {SETTINGS}, so that they are not of a run; take "
            "another folder"
        )
    try:
        job.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=job.output):
            pass  # fails here rather than after an hour
        _claim(job, option)
        write_whole(saved, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise OSError(f"{option} {job.output}: cannot be written: {os.strerror(error.errno or 0)}") from error


# Folder -> what holds its lock. Of a process that is gone the system lets go.
_claims: weakref.WeakValueDictionary[Path, _Claim] = weakref.WeakValueDictionary()


def _claim(job: Run, option: str) -> None:
    """Keeps other processes from writing to the run's folder as long as `job` is there."""
    folder = job.output.resolve()
    try:
        job.claim = _claims.get(folder) or _claims.setdefault(folder, _Claim(os.open(folder, os.O_RDONLY)))
    except BlockingIOError:
        raise ValueError(f"{option} {job.output}: another run is at work there; wait for it, or stop it") from None


class _Claim:
    """The lock of a folder: no file has to be left in it. A file system without locks gives one to everyone."""

    def __init__(self, folder: int) -> None:
        self._folder = folder
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass

    def __del__(self) -> None:
        os.close(self._folder)


def _difference(former: dict[str, Any], settings: dict[str, Any]) -> str:
    before, now = ({**s, **s["recipe"], "recipe": None} for s in (former, settings))
    return ", ".join(f"{key} {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key])


def summary(document: dict[str, Any]) -> str:
    """What a run came to, in two or three lines."""
    task, mode = task_named(document["task"]), document["recipe"]["mode"]
    lines = []
    if "dense_dev" in document:
        lines.append(f"{task.title}, dense: {_metrics(document['dense_dev'])}")
    if "dev" in document:
        found = document["dev"][document["recipe"]["decision"]]
        lines.append(
            f"{task.title}, {mode}: {_metrics(found)} at FLOPs ×{found['flops_speedup']:.2f} (no padding, predictors "
            f"included), {found['tokens_kept']:.1%} of the tokens kept"
        )
    return "\n".join(lines)


def _metrics(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in found["metrics"].items())
