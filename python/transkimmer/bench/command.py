"""The `bench` command."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from transkimmer_kernels import KERNELS, cpu_products, kernel_set
from transkimmer_kernels.files import write_whole

from ..architectures import layer_count
from ..arguments import check_least, check_outputs, option_of
from ..config import SkimConfig
from ..data import positions_of
from ..skimming import add_skimming
from . import show, workload
from .environment import environment
from .setting import MAX_LENGTH
from .timing import Row, compare
from .workload import DTYPES

SENTENCES = 8
SHORTEST = 4  # tokens that texts may be cut to, two of them special


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="demo",
        help=f"demo, {', '.join(workload.RANDOM_SHAPES)} (random weights), hub name or folder",
    )
    parser.add_argument(
        "--schedule", help="synthetic keep ratios: a task (mrpc, sst2, ...) or numbers; not for the demo"
    )
    parser.add_argument(
        "--lengths", help="with --schedule: mrpc, sst2, rte, imdb, squad2, or a text file (needs --tokenizer)"
    )
    parser.add_argument("--tokenizer", help="hub name or folder, to count the tokens of a text file; not for the demo")
    parser.add_argument(
        "--max-length", type=int, help=f"tokens, longer texts are cut; default: {MAX_LENGTH}; not for the demo"
    )
    parser.add_argument("--batch-size", type=int, default=None, help="default 32 for the demo, 16 with --schedule")
    parser.add_argument("--batches", type=int, default=None, help="default: all for the demo, 4 with --schedule")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the timing")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--kernels", default="auto", help=", ".join(KERNELS))
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the environment")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write what is printed as one HTML page")
    from .model_command import add_commands  # its results hold `environment`

    add_commands(parser)


def run(arguments: argparse.Namespace) -> int:
    check_least(arguments, batch_size=1, batches=1, threads=1, repeats=1, max_length=SHORTEST)
    check_outputs(arguments, ("json", "html"))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = Console(record=arguments.html is not None, width=None if os.isatty(1) else 150)
    if arguments.model == "demo":
        if arguments.schedule or arguments.lengths:
            raise ValueError("--schedule and --lengths do not go with the demo model, whose predictors are trained")
        for name in ("max_length", "tokenizer"):
            if (value := getattr(arguments, name)) is not None:
                option = f"{option_of(name)} {value}"
                raise ValueError(f"{option}: does not go with the demo model, which reads its own sentences")
        title, rows = _run_demo(arguments, console)
    else:
        title, rows = _run_schedule(arguments, console)
    if arguments.json is not None:
        _write_json(arguments.json, arguments, title, rows)
    if arguments.html is not None:
        show.save_html(console, arguments.html)
        console.print(f"wrote {arguments.html}")
    return 0


def _run_demo(arguments: argparse.Namespace, console: Console) -> tuple[str, list[Row]]:
    from ..demo import CLASS_NAMES, load_demo, stored_figures
    from ..demo import sentences as demo_sentences

    model, tokenizer = load_demo(kernels=arguments.kernels, dtype=DTYPES[arguments.dtype])
    sentences = demo_sentences()
    batches = workload.demo_batches(tokenizer, arguments.batch_size or 32, arguments.batches)
    count = sum(batch.lengths.numel() for batch in batches)
    console.print(
        f"{count} sentences, read {arguments.repeats + 1} times by each of four; on two idle cores in minutes"
    )
    rows = compare(model, batches, arguments.repeats)
    title = (
        f"MiniLM (6 layers) with skimming on {count} SST-2 dev sentences, learned decisions; "
        f"{arguments.dtype}, batch {arguments.batch_size or 32}, {_machine(arguments.kernels, arguments.dtype)}"
    )
    show.print_table(console, rows, title)
    stored = stored_figures()
    console.print(
        f"stored when it was trained: dense fine-tune {stored['dense_accuracy']:.2%}, "
        f"skimming {stored['accuracy']:.2%} at FLOPs ×{stored['flops_speedup']:.2f}"
    )
    show.print_sentences(console, model, tokenizer, [s.text for s in sentences[:SENTENCES]], CLASS_NAMES)
    return title, rows


def _run_schedule(arguments: argparse.Namespace, console: Console) -> tuple[str, list[Row]]:
    workload.check_model(arguments.model)
    if not arguments.schedule or not arguments.lengths:
        raise ValueError(f"--model {arguments.model}: needs --schedule and --lengths (see transkimmer bench --help)")
    if arguments.max_length is None:
        arguments.max_length = MAX_LENGTH  # also in the file that is written
    model: Any = workload.load_model(arguments.model)
    ratios = workload.parse_schedule(arguments.schedule, layer_count(model.config))
    longest = min(arguments.max_length, positions_of(model.config))
    lengths = workload.lengths_of(arguments.lengths, arguments.tokenizer, longest)
    size = arguments.batch_size or 16
    batches = workload.random_batches(lengths, size, arguments.batches or 4, model.config.vocab_size)
    model.to(dtype=DTYPES[arguments.dtype])
    add_skimming(model, SkimConfig(schedule=ratios), kernels=arguments.kernels)
    rows = compare(model.eval(), batches, arguments.repeats)
    title = (
        f"{arguments.model}, lengths of {arguments.lengths}, synthetic schedule {arguments.schedule}; "
        f"{arguments.dtype}, {len(batches)} batches of {size}, {_machine(arguments.kernels, arguments.dtype)}"
    )
    show.print_table(console, rows, title)
    return title, rows


def cpu_kernels(kernels: str, dtype: str) -> dict[str, str]:
    """Instruction set and form of product of the native CPU kernels; empty where others serve."""
    if kernel_set(kernels, "cpu", DTYPES[dtype]).serves["ragged_linear"] != "cpu":
        return {}
    return {
        "instruction_set": cpu_products.instruction_set(),
        "products": cpu_products.choose_form(DTYPES[dtype]),
    }


def _machine(kernels: str, dtype: str) -> str:
    """The end of a title."""
    threads = f"{torch.get_num_threads()} threads"
    if not (native_kernels := cpu_kernels(kernels, dtype)):
        backend = kernel_set(kernels, "cpu", DTYPES[dtype]).serves["ragged_linear"]
        return f"{backend} kernels, {threads}"
    return f"{native_kernels['instruction_set']}, {native_kernels['products']} products, {threads}"


def _write_json(path: Path, arguments: argparse.Namespace, title: str, rows: list[Row]) -> None:
    options = {key: value for key, value in vars(arguments).items() if isinstance(value, (str, int, float))}
    document = {
        "title": title,
        "options": options,
        "environment": environment() | {"cpu_kernels": cpu_kernels(arguments.kernels, arguments.dtype)},
        "rows": [row.to_dict() for row in rows],
    }
    write_whole(path, json.dumps(document, indent=2) + "\n")
