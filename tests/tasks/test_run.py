"""What a run reads its rows for, what it gives to its stages, and how its stages train."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from transkimmer import SkimConfig, add_skimming
from transkimmer.data import TokenizedExamples
from transkimmer.tasks import TASKS
from transkimmer.training import run
from transkimmer.training.kinds import Rows
from transkimmer.training.output import summary
from transkimmer.training.recipe import Recipe, recipe_of
from transkimmer.training.run import Run, hold_out, lessons_of
from transkimmer.training.stages import _arguments

from ..models.tiny import padded_inputs, tiny, undecided_predictors
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


# Rows


def test_no_more_rows_are_held_out_than_calibration_needs() -> None:
    rows = range(50_000)
    trained_on, held_out = hold_out(rows, recipe_of("corrected", TASKS["sst2"]))
    assert len(held_out) == 2000 and sorted([*trained_on, *held_out]) == list(rows)


@pytest.mark.parametrize("mode", ["corrected", "dense"])
def test_which_rows_a_run_reads_for_what(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is chosen by development rows, and nothing is trained on those that it is chosen by."""
    splits = {"train": [f"train {number}" for number in range(20)], "dev": ["dev 0", "dev 1"]}
    seen: list[tuple[Any, ...]] = []

    def noted(name: str, found: Any) -> Any:
        """A method that gives `found` and notes what it got, of rows the texts."""

        def method(job: Any, *given: Any) -> Any:
            seen.append((name, *(each.features if isinstance(each, Rows) else each for each in given)))
            return found

        return method

    def rows_of(job: Run, examples: Any, *rest: Any) -> Rows:
        return Rows(examples, [{"attention_mask": torch.ones(len(examples), 4)}])

    loaded = SimpleNamespace(from_pretrained=lambda start: None)
    monkeypatch.setattr(run, "AutoTokenizer", loaded)
    monkeypatch.setattr(run, "AutoConfig", loaded)
    monkeypatch.setattr(run, "load_split", lambda task, split, data: splits[split])
    monkeypatch.setattr(run, "save_whole", lambda *given: None)
    monkeypatch.setattr(run, "kind_of", lambda *given: SimpleNamespace(fit=lambda *rest: noted("fit", {})(None, *rest)))
    monkeypatch.setattr(Recipe, "check_speedup", lambda recipe, config, lengths: seen.append(("check", len(lengths))))
    monkeypatch.setattr(Run, "rows_of", rows_of)
    monkeypatch.setattr(Run, "dense_model", noted("train", "dense"))
    monkeypatch.setattr(Run, "skimming_model", noted("train", "skimming"))
    monkeypatch.setattr(Run, "_calibrate", noted("calibrate", {}))
    monkeypatch.setattr(Run, "judged", noted("judge", SimpleNamespace(to_dict=dict)))
    monkeypatch.setattr(Run, "_by_decision", lambda job, model, rows: rows.features)
    monkeypatch.setattr(Run, "_write", lambda job, figures: figures)
    recipe = recipe_of(mode, TASKS["sst2"], held_out=0.25)
    train, held_out = hold_out(splits["train"], recipe)
    figures = Run(TASKS["sst2"], recipe, "backbone", tmp_path).carry_out()
    of_dense = [("train", train, None), ("fit", "dense", held_out), ("judge", "dense", splits["dev"])]
    of_skimming = [("train", "dense", train, None), ("calibrate", "skimming", held_out), ("fit", "skimming", held_out)]
    assert seen == [("check", len(held_out)), *of_dense, *(of_skimming if mode == "corrected" else [])]
    if mode == "corrected":
        assert (figures["held_out"], figures["dev"]) == (held_out, splits["dev"])


# Decisions


def test_figures_by_decision_are_of_that_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws are the same ones in a resumed run."""
    job = Run(TASKS["sst2"], recipe_of("published", TASKS["sst2"], seed=5), "backbone", tmp_path)
    model = add_skimming(tiny("bert", "sequence"), SkimConfig(decision="sample"))

    def judged(job: Run, model: Any, rows: Any) -> Any:
        found = model.skimming.config.decision, float(torch.rand(()))
        return SimpleNamespace(to_dict=lambda: found)

    monkeypatch.setattr(Run, "judged", judged)
    torch.manual_seed(5)
    number = float(torch.rand(()))
    for _ in range(2):
        found = job._by_decision(model, None)
        assert found["threshold"][0] == "threshold" and found["sample"] == ("sample", number)
    assert model.skimming.config.decision == "sample"


def test_calibration_to_draws_aims_at_what_they_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Run(TASKS["sst2"], recipe_of("corrected", TASKS["sst2"], calibration="sampled"), "backbone", tmp_path)
    model = add_skimming(tiny("bert", "sequence"), SkimConfig(decision="sample")).eval()
    undecided_predictors(model)
    wanted: list[tuple[str, float]] = []

    def calibrate(model: Any, batches: Any, flops_speedup: float) -> float:
        wanted.append((model.skimming.config.decision, flops_speedup))
        return 0.25

    monkeypatch.setattr(run, "calibrate", calibrate)
    monkeypatch.setattr(Run, "_sampled", lambda job, model, rows: SimpleNamespace(flops_speedup=1.625))
    report = job._calibrate(model, Rows([], [padded_inputs()]))
    assert wanted == [("threshold", 1.625)] and (report["flops_speedup"], report["shift"]) == (1.625, 0.25)


@pytest.mark.parametrize(("mode", "value"), [("published", 0.25), ("corrected", 0.5)])
def test_the_summary_is_of_the_modes_decision(mode: str, value: float) -> None:
    figures = {
        name: {"metrics": {"accuracy": number}, "flops_speedup": 2.0, "tokens_kept": 0.5}
        for name, number in (("threshold", 0.5), ("sample", 0.25))
    }
    document = {"task": "rte", "recipe": recipe_of(mode, TASKS["rte"]).to_dict(), "dev": figures}
    assert summary(document).startswith(f"RTE, {mode}: accuracy {value:.4f} at FLOPs ×2.00")
