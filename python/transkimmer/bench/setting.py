"""What `bench model`, `bench training` and `profile` run on: a model, lengths, a batch size, a dtype."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch

from transkimmer_kernels import KERNELS

from ..architectures import layer_count
from ..config import SkimConfig
from ..data import positions_of
from ..skimming import add_skimming, remove_skimming
from . import workload
from .peers import Subject
from .workload import DTYPES, Batch

DEMO, DEMO_LENGTHS = "demo", "sst2-dev"
MAX_LENGTH = 512


@dataclass(frozen=True)
class Setting:
    """A workload by names. `schedule`: of `workload.SCHEDULES`, or numbers; None where decisions are learned.

    batches: so many different ones, at most, which the runs rotate over.
    """

    model: str
    lengths: str
    schedule: str | None
    batch_size: int
    batches: int
    dtype: str
    device: str
    threads: int

    @property
    def decisions(self) -> str:
        return "learned" if self.schedule is None else "synthetic"

    def __str__(self) -> str:
        schedule = "learned decisions" if self.schedule is None else f"synthetic schedule {self.schedule}"
        where = f"{self.threads} threads" if self.device == "cpu" else self.device
        return (
            f"{self.model}, lengths of {self.lengths}, {schedule}; {self.dtype}, "
            f"{self.batches} batches of {self.batch_size}, {where}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"decisions": self.decisions}


def add_arguments(parser: argparse.ArgumentParser, *, many: bool) -> None:
    """The arguments of a workload; with `many`, lengths, batch sizes and dtypes take several values each."""
    several: dict[str, Any] = {"nargs": "+"} if many else {}

    def default(*values: Any) -> Any:
        return list(values) if many else values[0]

    shapes = ", ".join(workload.RANDOM_SHAPES)
    parser.add_argument("--model", default="bert-base-shape", help=f"demo, {shapes} (random weights), hub name, folder")
    known = ", ".join(sorted(workload.known_lengths()))
    parser.add_argument(
        "--lengths",
        type=_lengths,
        default=default("mrpc"),
        **several,
        help=f"token counts of real texts: {known}; or one number for all; the demo has its own",
    )
    parser.add_argument(
        "--schedule", help="synthetic keep ratios: a task (mrpc, sst2, ...) or numbers; default: that of the lengths"
    )
    parser.add_argument("--batch-size", type=_positive, default=default(*((1, 8, 32) if many else (32,))), **several)
    parser.add_argument(
        "--batches", type=_positive, help="different batches to rotate over; default 4, or 16 sequences if that is more"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default=default("fp32"), **several)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one"
    )
    parser.add_argument("--kernels", default="auto", help=", ".join(KERNELS))
    parser.add_argument("--threads", type=_positive, help="CPU threads; default: torch's own choice")


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    """Every combination of what `add_arguments` has taken; sets the number of threads.

    Raises:
        ValueError: --device cuda without one, a schedule for the demo, whose decisions are learned, or none for
            lengths that are a number.
    """
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = device_of(arguments)
    demo = arguments.model == DEMO
    if demo and arguments.schedule:
        raise ValueError(f"--schedule {arguments.schedule}: the demo model's decisions are learned")
    numbers = [name for name in _listed(arguments.lengths) if name.isdigit()]
    if numbers and not demo and not arguments.schedule:
        raise ValueError(f"--lengths {numbers[0]}: a number has no schedule of its own; name one with --schedule")
    every_lengths = [DEMO_LENGTHS] if demo else _listed(arguments.lengths)
    for dtype, lengths, size in product(_listed(arguments.dtype), every_lengths, _listed(arguments.batch_size)):
        yield Setting(
            model=arguments.model,
            lengths=lengths,
            schedule=None if demo else arguments.schedule or lengths,
            batch_size=size,
            batches=arguments.batches or max(4, 16 // size),
            dtype=dtype,
            device=device,
            threads=torch.get_num_threads(),
        )


def device_of(arguments: argparse.Namespace) -> str:
    """ "cpu" or "cuda". Raises ValueError: --device cuda without one."""
    if arguments.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    device: str = arguments.device
    return device


def prepare(setting: Setting, kernels: str) -> tuple[Setting, Subject, list[Batch]]:
    """The setting with the number of batches there are, the models, and the batches on the device."""
    if setting.model == DEMO:
        from ..demo import load_demo

        skimming, tokenizer = load_demo(kernels=kernels)
        dense = remove_skimming(copy.deepcopy(skimming))
        batches = workload.demo_batches(tokenizer, setting.batch_size, setting.batches)
    else:
        dense = workload.load_model(setting.model)
        longest = min(MAX_LENGTH, positions_of(dense.config))
        lengths = workload.lengths_of(setting.lengths, None, longest)
        batches = workload.random_batches(lengths, setting.batch_size, setting.batches, dense.config.vocab_size)
        ratios = workload.parse_schedule(setting.schedule or "", layer_count(dense.config))
        skimming = add_skimming(copy.deepcopy(dense), SkimConfig(schedule=ratios), kernels=kernels).eval()
    models: list[Any] = [dense, skimming]
    dense, skimming = (model.to(setting.device) for model in models)
    subject = Subject(setting.model, dense, skimming, setting.decisions)
    batches = [batch.to(setting.device) for batch in batches]
    return replace(setting, batches=len(batches)), subject, batches


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def _lengths(text: str) -> str:
    if text not in workload.known_lengths() and (not text.isdigit() or not 1 <= int(text) <= MAX_LENGTH):
        known = ", ".join(sorted(workload.known_lengths()))
        raise argparse.ArgumentTypeError(f"{text}: must be one of {known}, or a number from 1 to {MAX_LENGTH}")
    return text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value
