"""`transkimmer train-demo`: MiniLM -> dense fine-tune on SST-2 -> skimming model, with Hugging Face's Trainer."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..arguments import check_least
from ..config import SkimConfig
from ..data import Example, TokenizedExamples, padded_batches, sample_path
from ..skimming import CONFIG_KEY, add_skimming, skimming_of
from ..tasks import TEXT_TASKS
from ..tasks.reading import read_table
from .model import EMBEDDINGS, FIGURES, FOLDER, WEIGHTS, backbone_folder, load_demo


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of both models; docs/training.md says how they were chosen."""

    seed: int = 42
    batch_size: int = 32
    held_out: int = 2000
    dense_learning_rate: float = 5e-5
    dense_epochs: float = 3.0
    learning_rate: float = 3e-5
    epochs: float = 4.0
    min_words: int = 8  # of what the skimming model trains on: a phrase of a few words has nothing to skim
    predictor_learning_rate: float = 3e-4
    skim_weight: float = 2.5
    skim_ramp: float = 0.3
    temperature: float = 1.0
    bias_init: float = 3.0
    distillation_weight: float = 1.0
    flops_speedup: float = 1.88  # on held-out phrases; whole sentences, which are longer, are skimmed more


DENSE_SETTINGS = ("seed", "batch_size", "held_out", "dense_learning_rate", "dense_epochs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="SST-2's train.tsv or train.tsv.xz")
    parser.add_argument(
        "--output", type=Path, default=FOLDER, help="folder for the weights and figures; default: the package's own"
    )
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="folder for the dense model and logs")
    parser.add_argument("--limit", type=int, default=None, help="train on N sentences only (a trial run)")


def run(arguments: argparse.Namespace) -> int:
    """Trains both models in `--work` and, when all is done, moves weights and figures to `--output`."""
    from ..training import calibrate  # needs accelerate, which only training does

    check_least(arguments, limit=1)
    if arguments.limit is not None and arguments.output.resolve() == FOLDER.resolve():
        raise ValueError(
            f"--limit {arguments.limit}: a trial run must not replace the package's own weights; give another --output"
        )
    recipe = Recipe()
    sentences = read_table(arguments.data, TEXT_TASKS["sst2"])
    random.Random(0).shuffle(sentences)
    if arguments.limit is not None:
        sentences = sentences[: recipe.held_out + arguments.limit]
    if len(sentences) <= recipe.held_out:
        raise ValueError(f"--data {arguments.data}: needs more than {recipe.held_out} sentences, has {len(sentences)}")
    tokenizer = AutoTokenizer.from_pretrained(backbone_folder())
    train, held_out = sentences[recipe.held_out :], sentences[: recipe.held_out]
    stage = arguments.work / "demo"
    for folder in (arguments.output, stage):
        folder.mkdir(parents=True, exist_ok=True)

    dense = _dense_model(train, tokenizer, recipe, arguments.work / "dense")
    long = [sentence for sentence in train if len(sentence.text.split()) >= recipe.min_words]
    teacher_logits = _logits(dense, TokenizedExamples(long, tokenizer), tokenizer)
    figures: dict[str, Any] = {"recipe": vars(recipe), "train_sentences": len(train), "skim_train_sentences": len(long)}
    figures.update(_figures(dense, tokenizer, held_out, prefix="dense_"))
    model = _train_skimming(dense, long, teacher_logits, tokenizer, recipe, arguments.work / "skimming")
    figures[CONFIG_KEY] = skimming_of(model).config.to_dict()
    _save_weights(model, stage)
    _write_figures(figures, stage)
    # What is calibrated and evaluated is what is stored: fp16 weights, loaded anew, without the Trainer's autocast.
    stored, _ = load_demo(folder=stage)
    held_out_batches = list(padded_batches(TokenizedExamples(held_out, tokenizer), tokenizer, 64, sort=True))
    figures["calibration_shift"] = calibrate(stored, held_out_batches, recipe.flops_speedup)
    _save_weights(stored, stage)
    stored, _ = load_demo(folder=stage)
    figures.update(_figures(stored, tokenizer, held_out, prefix=""))
    _write_figures(figures, stage)
    _move(stage, arguments.output)
    print(json.dumps(figures, indent=2))
    return 0


def _save_weights(model: PreTrainedModel, folder: Path) -> None:
    tensors = {n: t.half().contiguous() for n, t in model.state_dict().items() if not n.startswith(EMBEDDINGS)}
    save_file(tensors, folder / WEIGHTS)


def _write_figures(figures: dict[str, Any], folder: Path) -> None:
    (folder / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _move(stage: Path, output: Path) -> None:
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
    shutil.rmtree(stage)


def _dense_model(
    train: Sequence[Example], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, work: Path
) -> PreTrainedModel:
    """The dense fine-tune, from `work` where an earlier run with the same settings has finished it."""
    settings = {"train_sentences": len(train), **{k: v for k, v in vars(recipe).items() if k in DENSE_SETTINGS}}
    saved = work / "settings.json"
    if saved.is_file() and json.loads(saved.read_text(encoding="utf-8")) == settings:
        print(f"using the dense model in {work}")
        return _without_embeddings(AutoModelForSequenceClassification.from_pretrained(work)).eval()
    model = _train_dense(train, tokenizer, recipe, work)
    model.save_pretrained(work)
    saved.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return model


def _without_embeddings(model: PreTrainedModel) -> PreTrainedModel:
    """To be trained: these stay as published, and need not be stored."""
    model.base_model.embeddings.requires_grad_(False)
    return model


def _train_dense(
    train: Sequence[Example], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, work: Path
) -> PreTrainedModel:
    set_seed(recipe.seed)
    model = _without_embeddings(AutoModelForSequenceClassification.from_pretrained(backbone_folder(), num_labels=2))
    arguments = TrainingArguments(
        **_common(recipe, work),
        learning_rate=recipe.dense_learning_rate,
        num_train_epochs=recipe.dense_epochs,
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=TokenizedExamples(train, tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
    ).train()
    return model.eval()


def _train_skimming(
    dense: PreTrainedModel,
    train: Sequence[Example],
    teacher_logits: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    work: Path,
) -> PreTrainedModel:
    from ..training import SkimTrainer, SkimTrainingArguments  # needs accelerate, which only training does

    set_seed(recipe.seed)
    config = SkimConfig(temperature=recipe.temperature, skim_weight=recipe.skim_weight, bias_init=recipe.bias_init)
    model = add_skimming(dense, config)
    arguments = SkimTrainingArguments(
        **_common(recipe, work),
        learning_rate=recipe.learning_rate,
        num_train_epochs=recipe.epochs,
        predictor_learning_rate=recipe.predictor_learning_rate,
        skim_ramp=recipe.skim_ramp,
        distillation_weight=recipe.distillation_weight,
    )
    SkimTrainer(
        model=model,
        args=arguments,
        train_dataset=TokenizedExamples(train, tokenizer, teacher_logits=teacher_logits),
        data_collator=DataCollatorWithPadding(tokenizer),
    ).train()
    return model.eval()


def _common(recipe: Recipe, work: Path) -> dict[str, Any]:
    return {
        "output_dir": str(work),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": True,
        "per_device_train_batch_size": recipe.batch_size,
        "train_sampling_strategy": "group_by_length",
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.06,  # share of the steps
        "weight_decay": 0.01,
        "logging_steps": 200,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "seed": recipe.seed,
    }


@torch.inference_mode()
def _logits(model: PreTrainedModel, examples: TokenizedExamples, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """fp32 [examples, 2], in the order of the examples."""
    from ..training.evaluation import inputs_of

    order = sorted(range(len(examples)), key=lambda i: len(examples.input_ids[i]))
    logits = []
    for batch in tqdm(padded_batches(examples, tokenizer, 128, sort=True), total=-(-len(order) // 128), desc="teacher"):
        with torch.autocast("cpu", torch.bfloat16, enabled=not torch.cuda.is_available()):
            logits.append(model(**inputs_of(batch, model)).logits.float().cpu())
    restored = torch.empty(len(order), 2)
    restored[torch.tensor(order)] = torch.cat(logits)
    return restored


def _figures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: Sequence[Example], prefix: str
) -> dict[str, Any]:
    from ..training import evaluate_classifier

    figures: dict[str, Any] = {}
    for name, sentences in (("", read_table(sample_path(), TEXT_TASKS["sst2"])), ("held_out_", held_out)):
        batches = padded_batches(TokenizedExamples(sentences, tokenizer), tokenizer, 64, sort=True)
        result = evaluate_classifier(model, batches)
        figures[f"{prefix}{name}accuracy"] = result.accuracy
        if not prefix:
            figures[f"{name}tokens_kept"] = result.tokens_kept
            figures[f"{name}tokens_kept_by_layer"] = result.tokens_kept_by_layer
            figures[f"{name}flops_speedup"] = result.flops_speedup
    return figures
