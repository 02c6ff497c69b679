"""`transkimmer train-demo`: MiniLM -> dense fine-tune on SST-2 -> skimming model, by the stages of `train`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from ..arguments import check_least
from ..data import Example, TokenizedExamples, padded_batches
from ..demo import load_demo, sentences
from ..demo.model import EMBEDDINGS, FIGURES, FOLDER, WEIGHTS, backbone_folder
from ..skimming import CONFIG_KEY, skimming_of
from ..tasks import TEXT_TASKS
from ..tasks.reading import read_table
from .calibration import calibrate
from .evaluation import evaluate_classifier
from .recipe import SETTINGS, Recipe

RECIPE = Recipe(  # docs/training.md says how it was chosen
    "corrected",
    bf16=True,
    epochs=4.0,
    skim_weight=2.5,
    aim=False,
    skim_ramp=0.3,
    state_distillation_weight=0.0,
    flops_speedup=1.88,  # on held-out phrases; whole sentences, which are longer, are skimmed more
)
HELD_OUT = 2000  # phrases, not a share, so that a trial run is also calibrated on them
MIN_WORDS = 8  # of what the skimming model trains on: a phrase of a few words has nothing to skim


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="SST-2's train.tsv or train.tsv.xz")
    parser.add_argument(
        "--output", type=Path, default=FOLDER, help="folder for the weights and figures; default: the package's own"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/demo"),
        help="folder for both models and logs; a run that was interrupted goes on there",
    )
    parser.add_argument("--limit", type=int, default=None, help="train on N sentences only (a trial run)")


def run(arguments: argparse.Namespace) -> int:
    """Trains both models in `--work` and, when all is done, moves weights and figures to `--output`."""
    # These need accelerate, which only training does.
    from .output import prepare_output
    from .run import Run

    check_least(arguments, limit=1)
    if not arguments.data.is_file():
        raise ValueError(f"--data {arguments.data}: no such file; must be SST-2's train.tsv or train.tsv.xz")
    if arguments.limit is not None and arguments.output.resolve() == FOLDER.resolve():
        raise ValueError(
            f"--limit {arguments.limit}: a trial run must not replace the package's own weights; give another --output"
        )
    task, backbone, recipe = TEXT_TASKS["sst2"], backbone_folder(), dataclasses.replace(RECIPE, limit=arguments.limit)
    train, held_out = _split(read_table(arguments.data, task), arguments)
    job = Run(task, recipe, str(backbone), arguments.work, arguments.data, cuda_graphs=False, frozen_embeddings=True)
    prepare_output(job, resume=(arguments.work / SETTINGS).is_file(), option="--work")
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    batches = {
        name: list(padded_batches(TokenizedExamples(rows, tokenizer), tokenizer, 64, sort=True))
        for name, rows in (("", sentences()), ("held_out_", held_out))
    }

    dense = job.dense_model(train, tokenizer)
    long = [sentence for sentence in train if len(sentence.text.split()) >= MIN_WORDS]
    figures: dict[str, Any] = {"recipe": recipe.to_dict() | {"held_out": HELD_OUT, "min_words": MIN_WORDS}}
    figures |= {"train_sentences": len(train), "skim_train_sentences": len(long)}
    figures |= _figures(dense, batches, prefix="dense_")
    model = job.skimming_model(dense, long, tokenizer)
    figures[CONFIG_KEY] = skimming_of(model).config.to_dict()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        stage = Path(folder)
        _save_weights(model, stage)
        _write_figures(figures, stage)
        # What is calibrated and evaluated is what is stored: fp16 weights, loaded anew.
        stored, _ = load_demo(folder=stage)
        figures["calibration_shift"] = _calibrate(stored, batches["held_out_"], recipe)
        _save_weights(stored, stage)
        stored, _ = load_demo(folder=stage)
        figures |= _figures(stored, batches, prefix="")
        _write_figures(figures, stage)
        _put(stage, arguments.output)
    print(json.dumps(figures, indent=2))
    return 0


def _split(rows: list[Example], arguments: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """(sentences to train on, held-out ones)."""
    random.Random(0).shuffle(rows)
    if arguments.limit is not None:
        rows = rows[: HELD_OUT + arguments.limit]
    if len(rows) <= HELD_OUT:
        raise ValueError(f"--data {arguments.data}: needs more than {HELD_OUT} sentences, has {len(rows)}")
    return rows[HELD_OUT:], rows[:HELD_OUT]


def _calibrate(model: PreTrainedModel, held_out: list[dict[str, Tensor]], recipe: Recipe) -> float | None:
    """The shift of the logits; None, with a warning, where a trial run has not learned to skim enough."""
    try:
        return calibrate(model, held_out, recipe.flops_speedup)
    except ValueError as error:
        if recipe.limit is None:
            raise
        warnings.warn(f"not calibrated: {error}", stacklevel=2)
        return None


def _save_weights(model: PreTrainedModel, folder: Path) -> None:
    tensors = {n: t.half().contiguous() for n, t in model.state_dict().items() if not n.startswith(EMBEDDINGS)}
    save_file(tensors, folder / WEIGHTS)


def _write_figures(figures: dict[str, Any], folder: Path) -> None:
    (folder / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _put(stage: Path, output: Path) -> None:
    """Both files are copied, which may fail, before either takes the place of an old one."""
    partial = {name: output / f".{name}.partial" for name in (WEIGHTS, FIGURES)}
    try:
        for name, copy in partial.items():
            shutil.copyfile(stage / name, copy)
        for name, copy in partial.items():
            os.replace(copy, output / name)
    finally:
        for copy in partial.values():
            copy.unlink(missing_ok=True)


def _figures(
    model: PreTrainedModel, batches: Mapping[str, Iterable[Mapping[str, Tensor]]], prefix: str
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, part in batches.items():
        result = evaluate_classifier(model, part)
        figures[f"{prefix}{name}accuracy"] = result.accuracy
        if not prefix:
            figures[f"{name}tokens_kept"] = result.tokens_kept
            figures[f"{name}tokens_kept_by_layer"] = result.tokens_kept_by_layer
            figures[f"{name}flops_speedup"] = result.flops_speedup
    return figures
