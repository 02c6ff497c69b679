"""`transkimmer evaluate`: what a trained model gets right on a task, and what it costs, in FLOPs and on the clock."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from transkimmer_kernels import KERNELS
from transkimmer_kernels.files import write_whole

from ..architectures import layer_count
from ..arguments import MODEL as FILES
from ..arguments import check_folder, check_least, check_outputs, option_of
from ..bench import picture, show
from ..bench.contenders import KEEP_ALL, SKIMMING, contenders
from ..bench.environment import environment
from ..bench.timing import paired_speedup, relative_spread, time_in_turn
from ..bench.workload import Batch
from ..flops import EncoderShape, count_flops
from ..skimming import skimming_of
from ..tasks import TASKS, Task, load_split, task_named
from .evaluation import evaluate, training_forward_difference
from .judges import Judge
from .kinds import Kind, QuestionKind, TextKind, kind_of
from .passages import of_different_passages, print_passages, read_passage
from .recipe import MODEL, SETTINGS, recipe_of

SHOWN, DRAWN = 16, 8
OUTPUTS = ("json", "markdown", "answers", "html", "png")
NEED_SKIMMING = ("check_training_forward", "html", "png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained model, or a run's --output")
    parser.add_argument("--task", required=True, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--data", type=Path, help="folder with the task's official files; default: from the hub")
    parser.add_argument(
        "--split",
        default="dev",
        help="dev, train, of some tasks others; dev of 20News, of IMDB and of Yelp from the hub is their test split",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="rows at a time")
    parser.add_argument(
        "--max-length", type=int, help="tokens; default: that of the run in --model, of another folder 512, SQuAD 384"
    )
    parser.add_argument("--doc-stride", type=int, help="as --max-length (SQuAD); of another folder 128")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the timing; 0: no timing")
    parser.add_argument("--kernels", default="auto", help=", ".join(KERNELS))
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument(
        "--check-training-forward",
        action="store_true",
        help="compare the logits of the training forward, noise off, with those of real removal, on every row",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the printed table")
    parser.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="write the answer to each question, as SQuAD's own script reads them",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help=f"write {SHOWN} texts, coloured by skim layer")
    parser.add_argument("--png", type=Path, metavar="FILE", help=f"draw {DRAWN} texts, coloured by skim layer")


def run(arguments: argparse.Namespace) -> int:
    task = task_named(arguments.task)
    check_least(arguments, batch_size=1, repeats=0, threads=1)
    splits = task.hub_splits if arguments.data is None else task.files
    if arguments.split not in splits:
        raise ValueError(f"--split {arguments.split}: must be one of {', '.join(splits)} for {task.title}")
    check_outputs(arguments, OUTPUTS)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.png is not None:
        picture.check_matplotlib(f"--png {arguments.png}")
    folder = model_folder(arguments.model)
    given = {name: getattr(arguments, name) for name in ("max_length", "doc_stride")}
    given = _trained_with(arguments.model, task) | {name: x for name, x in given.items() if x is not None}
    recipe = recipe_of("dense", task, **given)
    kind = kind_of(task, recipe.doc_stride)
    if arguments.answers is not None and not isinstance(kind, QuestionKind):
        raise ValueError(f"--answers {arguments.answers}: {task.title} has no questions")
    model, tokenizer = load(folder, kind, arguments.kernels), AutoTokenizer.from_pretrained(folder)
    for name in NEED_SKIMMING:
        if (value := getattr(arguments, name)) and not hasattr(model, "skimming"):
            raise ValueError(f"{option_of(name)}{'' if value is True else f' {value}'}: the model does not skim")
    examples = load_split(task, arguments.split, arguments.data)
    max_length = recipe.longest(model.config)
    rows = kind.rows(examples, tokenizer, max_length, arguments.batch_size)
    batches, judge = rows.batches, kind.judge(rows.features, model)
    figures = figures_of(model, task, batches, arguments.repeats, judge)
    if arguments.check_training_forward:
        again = kind.judge(rows.features, model)
        figures["training_forward"] = vars(training_forward_difference(model, batches, again))
    text = markdown(task, arguments.split, figures)
    print(text)
    if arguments.json is not None:
        document = {"model": str(arguments.model), "task": task.name, "split": arguments.split, **figures}
        write_whole(arguments.json, json.dumps({**document, "environment": environment()}, indent=2) + "\n")
    if arguments.markdown is not None:
        write_whole(arguments.markdown, text + "\n")
    if arguments.answers is not None:
        write_whole(arguments.answers, json.dumps(judge.predictions, indent=2) + "\n")
    if arguments.html is not None:
        _write_html(arguments.html, model, tokenizer, kind, examples, max_length)
    if arguments.png is not None:
        _draw(arguments.png, model, tokenizer, kind, examples, max_length)
    for name in OUTPUTS:
        if (path := getattr(arguments, name)) is not None:
            print(f"wrote {path}")
    return 0


def _trained_with(folder: Path, task: Task) -> dict[str, Any]:
    """How texts were cut where `folder` is the output of a run on the same task; nothing where it is not."""
    if not (folder / SETTINGS).is_file():
        return {}
    run = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if run["task"] != task.name:
        trained_on = task_named(run["task"]).title
        print(f"note: --model {folder} was trained on {trained_on}; --task is {task.title}", file=sys.stderr)
        return {}
    # A setting that did not exist when the run was begun had its default.
    return {name: run["recipe"].get(name) for name in ("max_length", "doc_stride")}


def model_folder(path: Path) -> Path:
    """`path`, or the model within it where it is a run's output."""
    folder = path / MODEL if (path / MODEL).is_dir() else path
    check_folder("--model", str(folder), (*FILES, "tokenizer"), "a folder with a trained model, or a run's --output")
    return folder


def load(folder: Path, kind: Kind, kernels: str = "auto") -> PreTrainedModel:
    """A dense or skimming model for a task of this kind, in eval mode, on the GPU where there is one."""
    model = kind.load(folder, "--model", kernels)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model


def figures_of(
    model: PreTrainedModel, task: Task, batches: Sequence[dict[str, Tensor]], repeats: int, judge: Judge
) -> dict[str, Any]:
    """Everything that is reported; the timing only with `repeats` and a skimming model."""
    with count_flops() as counted:
        result = evaluate(model, batches, judge)
    figures: dict[str, Any] = result.to_dict()
    shape = EncoderShape.of_model(model)
    if not shape.predictor:
        return figures
    lengths, layers = result.lengths, result.layer_lengths
    cut, config = skimming_of(model).first_token_only, skimming_of(model).config
    dense = shape.dense_flops(lengths, first_token_only=cut)
    shape_executed = shape.as_executed(scores_first=config.decision == "sample" and config.schedule is None)
    executed = shape_executed.skimming_flops(lengths, layers, first_token_only=cut)
    figures |= {
        "decision": config.decision,
        "padded_length": task.padded_length,
        "padded_flops_speedup": shape.padded_flops_speedup(lengths, layers, task.padded_length),
        "executed_flops_speedup": dense / executed,
        "executed_flops": executed,
        "counted_flops": counted.of_operators(),
    }
    if repeats:
        figures |= wall_clock(model, batches, repeats, figures["executed_flops_speedup"])
    return figures


def wall_clock(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], repeats: int, flops_speedup: float
) -> dict[str, float | None]:
    """Skimming against our own dense run without padding, side by side on the same batches."""
    device = model.device
    loaded = []
    for batch in batches:
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        loaded.append(Batch(inputs, inputs["attention_mask"].sum(1)))
    field = [contender for contender in contenders(model) if contender.name in (KEEP_ALL, SKIMMING)]
    with torch.inference_mode():
        time_in_turn(field, loaded[:1], 1, KEEP_ALL, device=device.type)  # warm-up
        seconds = time_in_turn(field, loaded, repeats, KEEP_ALL, device=device.type)
    skimming_of(model).enabled = True
    speedup = paired_speedup(seconds[KEEP_ALL], seconds[SKIMMING])
    spreads = [spread for times in seconds.values() if (spread := relative_spread(times)) is not None]
    return {
        "dense_s": statistics.median(seconds[KEEP_ALL]),
        "skimming_s": statistics.median(seconds[SKIMMING]),
        "wall_clock_speedup": speedup,
        "spread": max(spreads) if spreads else None,
        "skim_efficiency": speedup / flops_speedup,
    }


def markdown(task: Task, split: str, figures: dict[str, Any]) -> str:
    """The figures as a table."""
    rows = [(name, f"{value:.4f}") for name, value in figures["metrics"].items()]
    if "decision" in figures:
        rows += [
            ("FLOPs speedup, no padding", f"{figures['flops_speedup']:.2f}"),
            (f"FLOPs speedup, dense padded to {figures['padded_length']}", f"{figures['padded_flops_speedup']:.2f}"),
            ("FLOPs speedup, as executed", f"{figures['executed_flops_speedup']:.2f}"),
            ("FLOPs executed, closed form", f"{figures['executed_flops']:,}"),
            ("FLOPs executed, counted operator by operator", f"{figures['counted_flops']:,}"),
        ]
    if "wall_clock_speedup" in figures:
        rows += [
            ("wall-clock speedup over our dense run without padding", f"{figures['wall_clock_speedup']:.2f}"),
            ("skim efficiency", f"{figures['skim_efficiency']:.2f}"),
            ("spread of the timing", show.spread_text(figures["spread"])),
        ]
    if "decision" in figures:
        rows.append(("tokens kept", f"{figures['tokens_kept']:.1%}"))
        by_layer = " ".join(f"{kept:.0%}" for kept in figures["tokens_kept_by_layer"])
        rows.append(("tokens kept by layer", by_layer))
    if "training_forward" in figures:
        found = figures["training_forward"]
        rows += [(f"{name} in the training forward", f"{value:.4f}") for name, value in found["metrics"].items()]
        if found["agreement"] is not None:
            rows.append(("same prediction in the training forward", f"{found['agreement']:.2%}"))
        rows.append(
            (
                "largest difference of a logit, training forward and removal",
                f"{found['max_difference']:.1e} of {found['max_logit']:.3g}",
            )
        )
    lines = [f"| {task.title}, {split}, {figures['examples']} {task.counted} | |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)])


def _write_html(
    path: Path, model: PreTrainedModel, tokenizer: Any, kind: Kind, examples: Sequence[Any], max_length: int
) -> None:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=150, file=nowhere)
        if isinstance(kind, QuestionKind):
            questions = itertools.islice(of_different_passages(examples), SHOWN)
            print_passages(console, model, tokenizer, kind, questions, max_length)
        elif isinstance(kind, TextKind):
            texts = [(example.text, example.pair) for example in examples[:SHOWN]]
            gold = [example.label for example in examples[:SHOWN]]
            show.print_sentences(console, model, tokenizer, texts, kind.task.classes, gold, max_length)
    show.save_html(console, path)


def _draw(
    path: Path, model: PreTrainedModel, tokenizer: Any, kind: Kind, examples: Sequence[Any], max_length: int
) -> None:
    texts = []
    if isinstance(kind, QuestionKind):
        for question in itertools.islice(of_different_passages(examples), DRAWN):
            found = read_passage(model, tokenizer, kind, question, max_length)
            title = f"{question.text.strip()} {found.answers()}"
            texts.append(picture.ColouredText(found.shown_words(), title, found.marked_words()))
    elif isinstance(kind, TextKind):
        for example in examples[:DRAWN]:
            words, predicted = show.word_depths(model, tokenizer, example.text, example.pair, max_length)
            title = show.answer_names(predicted, example.label, kind.task.classes)
            texts.append(picture.ColouredText(words, title))
    picture.draw(path, [text for text in texts if text.words], layer_count(model.config))
