"""What a run gives to its stages, and how its stages train."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from transkimmer import add_skimming
from transkimmer.data import TokenizedExamples
from transkimmer.tasks import TASKS
from transkimmer.training import evaluation, run, training_forward_difference
from transkimmer.training.recipe import Recipe, recipe_of
from transkimmer.training.run import hold_out, lessons_of
from transkimmer.training.stages import _arguments

from ..models.tiny import padded_inputs, tiny
from ..models.words import word_tokenizer
from .test_commands import backbone, data, train

__all__ = ["backbone", "data"]  # fixtures

# Fields of a recipe that `Trainer` or `SkimTrainer` reads: a value that is no default, and the name there.
DENSE = {
    "seed": (7, "seed"),
    "dense_epochs": (1.5, "num_train_epochs"),
    "dense_learning_rate": (2e-4, "learning_rate"),
    "batch_size": (6, "per_device_train_batch_size"),
    "gradient_accumulation": (3, "gradient_accumulation_steps"),
    "warmup": (0.2, "warmup_steps"),
    "weight_decay": (0.03, "weight_decay"),
    "max_grad_norm": (0.5, "max_grad_norm"),
    "bf16": (True, "bf16"),
}
SKIMMING = {
    **{name: value for name, value in DENSE.items() if not name.startswith("dense_")},
    "epochs": (4.5, "num_train_epochs"),
    "learning_rate": (7e-4, "learning_rate"),
    "predictor_learning_rate": (6e-4, "predictor_learning_rate"),
    "skim_ramp": (0.15, "skim_ramp"),
    "noise_decay": (0.35, "noise_decay"),
    "distillation_weight": (1.25, "distillation_weight"),
    "state_distillation_weight": (2.25, "state_distillation_weight"),
}
# What the model, the rows or the run itself read.
ELSEWHERE = {
    *("mode", "warm_start", "max_length", "doc_stride", "predictor_width", "bias_init", "temperature", "skim_weight"),
    *("aim", "skim_attention", "pruned_training", "decision", "calibration", "flops_speedup", "held_out", "limit"),
}


@pytest.mark.parametrize("skimming", [False, True], ids=["dense", "skimming"])
def test_a_stage_trains_as_the_recipe_says(skimming: bool, tmp_path: Path) -> None:
    every = {**DENSE, **SKIMMING}
    assert {field.name for field in dataclasses.fields(Recipe)} == {*every, *ELSEWHERE}
    recipe = Recipe("corrected", **{name: value for name, (value, _) in every.items()})
    plain = Recipe("corrected")
    assert not [name for name, (value, _) in every.items() if getattr(plain, name) == value]
    for steps, saved in ((None, 0.2), (11, 11)):
        found = _arguments(recipe, tmp_path, skimming, steps)
        assert (found.output_dir, found.save_steps) == (str(tmp_path), saved)
        wanted = SKIMMING if skimming else DENSE
        expected = {there: value for value, there in wanted.values()}
        assert {there: getattr(found, there) for there in expected} == expected
        assert found.lr_scheduler_type == "linear" and found.train_sampling_strategy == "group_by_length"


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ([], {"teacher_logits", "teacher_states"}),
        (["--distillation-weight", "0"], {"teacher_states"}),
        (["--state-distillation-weight", "0"], {"teacher_logits"}),
        (["--distillation-weight", "0", "--state-distillation-weight", "0"], set()),
    ],
)
def test_skimming_is_taught_by_the_dense_fine_tune(
    options: list[str], columns: set[str], tmp_path: Path, backbone: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught: list[TokenizedExamples] = []
    train_stage = run.train_stage

    def seen(model: Any, tokenizer: Any, examples: TokenizedExamples, *arguments: Any, **named: Any) -> Any:
        if named["skimming"]:
            taught.append(examples)
        return train_stage(model, tokenizer, examples, *arguments, **named)

    monkeypatch.setattr(run, "train_stage", seen)
    assert train(backbone, data, tmp_path / "run", "--limit", "20", *options) == 0
    (examples,) = taught
    assert set(examples[0]) & {"teacher_logits", "teacher_states"} == columns and len(examples) == 18
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/dense/model")
    logits, states = lessons_of(dense, examples, word_tokenizer())
    for name, lessons in (("teacher_logits", logits), ("teacher_states", states)):
        if name in columns:
            torch.testing.assert_close(torch.stack(list(getattr(examples, name))), torch.stack(lessons))


def test_a_dense_fine_tune_of_16_bits_is_trained_in_32(tmp_path: Path, data: Path) -> None:
    tiny("bert", "sequence").half().save_pretrained(tmp_path / "dense")
    word_tokenizer().save_pretrained(tmp_path / "dense")
    assert train(tmp_path, data, tmp_path / "run", "--dense", str(tmp_path / "dense"), "--epochs", "1") == 0
    weights = load_file(tmp_path / "run/model/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    before = load_file(tmp_path / "dense/model.safetensors")
    assert {tensor.dtype for tensor in before.values()} == {torch.float16}
    document = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    assert (document["dense"], document["backbone"]) == (str(tmp_path / "dense"), None)


def test_no_more_rows_are_held_out_than_calibration_needs() -> None:
    rows = range(50_000)
    trained_on, held_out = hold_out(rows, recipe_of("corrected", TASKS["sst2"]))
    assert len(held_out) == 2000 and sorted([*trained_on, *held_out]) == list(rows)


def test_a_training_forward_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any batch, before or behind others that are."""
    forward = evaluation._training_forward
    for bad in (0, 1):
        calls: list[Any] = []

        def poisoned(model: Any, inputs: Any, bad: int = bad, calls: list[Any] = calls) -> Any:
            calls.append(forward(model, inputs))
            if len(calls) - 1 == bad:
                calls[-1].logits[0, 0] = math.nan
            return calls[-1]

        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "_training_forward", poisoned)
            found = training_forward_difference(add_skimming(tiny("bert", "sequence")), [padded_inputs()] * 2)
        assert len(calls) == 2 and math.isnan(found.max_difference) and math.isfinite(found.max_logit)
