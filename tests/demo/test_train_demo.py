"""`transkimmer train-demo` on a tiny backbone: what it stores is the model whose figures it stores."""

from __future__ import annotations

import dataclasses
import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transkimmer.cli import main
from transkimmer.data import TokenizedExamples, padded_batches
from transkimmer.demo import load_demo, model, sentences, stored_figures
from transkimmer.training import demo_command, evaluate_classifier
from transkimmer.training import run as training_run

from ..models.tiny import tiny
from ..models.words import word_tokenizer

RECIPE = dataclasses.replace(
    demo_command.RECIPE, batch_size=8, dense_epochs=1, epochs=1, bias_init=1, flops_speedup=1.1
)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    tiny("bert", "sequence").save_pretrained(tmp_path / "backbone")
    word_tokenizer().save_pretrained(tmp_path / "backbone")
    for module in (model, demo_command):
        monkeypatch.setattr(module, "backbone_folder", lambda: tmp_path / "backbone")
    for name, value in (("RECIPE", RECIPE), ("HELD_OUT", 8), ("MIN_WORDS", 4)):
        monkeypatch.setattr(demo_command, name, value)
    words = random.Random(0)
    rows = ["sentence\tlabel"]
    for number in range(48):
        text = words.choices(["dog", "cat", "runs", "sleeps", "un"], k=words.randint(2, 9))
        rows.append(" ".join([*text, "happy" if number % 2 else "sad"]) + f"\t{number % 2}")
    (tmp_path / "train.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    places = {"--data": "train.tsv", "--output": "demo", "--work": "work"}
    return ["train-demo", *(part for option, place in places.items() for part in (option, str(tmp_path / place)))]


def test_what_is_stored_is_what_was_measured(tmp_path: Path, arguments: list[str]) -> None:
    assert main(arguments) == 0
    demo, tokenizer = load_demo(folder=tmp_path / "demo")
    examples = TokenizedExamples(sentences(), tokenizer)
    found = evaluate_classifier(demo, padded_batches(examples, tokenizer, 64, sort=True))
    figures = stored_figures(tmp_path / "demo")
    assert (figures["accuracy"], figures["flops_speedup"]) == (found.accuracy, found.flops_speedup)
    assert figures["tokens_kept_by_layer"] == found.tokens_kept_by_layer
    assert figures["train_sentences"] == 40 > figures["skim_train_sentences"] > 0
    assert figures["calibration_shift"] < 0 and figures["held_out_flops_speedup"] >= 1.1
    assert figures["recipe"] == vars(RECIPE) | {"held_out": 8, "min_words": 4}
    assert {"dense_accuracy", "held_out_accuracy"} <= figures.keys()
    published, *trained = (
        load_file(tmp_path / place / "model.safetensors")
        for place in ("backbone", "work/dense/model", "work/skimming/model")
    )
    embeddings = [name for name in published if "embeddings" in name]
    for weights in trained:
        assert embeddings and all(torch.equal(weights[name], published[name]) for name in embeddings)


def test_a_run_that_cannot_be_calibrated_leaves_what_was_there(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = tmp_path / "demo"
    demo.mkdir()
    for name in (model.WEIGHTS, model.FIGURES):
        (demo / name).write_text(f"old {name}", encoding="utf-8")

    def out_of_reach(*_: object) -> float:
        raise ValueError("flops_speedup=1.1: skims to 1.00 at most")

    monkeypatch.setattr(demo_command, "calibrate", out_of_reach)
    assert main(arguments) == 2
    assert "skims to 1.00 at most" in capsys.readouterr().err
    left = {path.name: path.read_text(encoding="utf-8") for path in demo.iterdir()}
    assert left == {name: f"old {name}" for name in (model.WEIGHTS, model.FIGURES)}


@pytest.mark.parametrize("full", ["never", model.WEIGHTS, model.FIGURES])
def test_both_files_are_replaced_or_none(full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("new", "old"):
        (tmp_path / folder).mkdir()
        for name in (model.WEIGHTS, model.FIGURES):
            (tmp_path / folder / name).write_text(folder, encoding="utf-8")
    copyfile = shutil.copyfile

    def copy(source: Path, target: Path) -> None:
        copyfile(source, target)
        if source.name == full:
            raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "copyfile", copy)
    with nullcontext() if full == "never" else pytest.raises(OSError, match="no space"):
        demo_command._put(tmp_path / "new", tmp_path / "old")
    found = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "old").iterdir()}
    assert found == dict.fromkeys((model.WEIGHTS, model.FIGURES), "new" if full == "never" else "old")


def test_a_trial_run_does_not_replace_the_packages_own_weights(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_command, "FOLDER", tmp_path / "package")
    start = [word for word in arguments if word not in ("--output", str(tmp_path / "demo"))]
    for given, limit, message in (
        (arguments, "-5", "--limit -5: must be at least 1"),
        (arguments, "0", "--limit 0: must be at least 1"),
        (start, "5", "--limit 5: a trial run must not replace the package's own weights; give another --output"),
        ([*start, "--output", str(tmp_path / "x/../package")], "5", "--limit 5: a trial run must not replace"),
    ):
        assert main([*given, "--limit", limit]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "package").exists() and not (tmp_path / "work").exists()
    assert main([*arguments, "--limit", "30"]) == 0
    assert stored_figures(tmp_path / "demo")["train_sentences"] == 30
    assert [path.name for path in (tmp_path / "work").iterdir() if "demo" in path.name] == []


def test_a_trial_run_that_has_not_learned_to_skim_is_kept_as_it_is(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any) -> float:
        raise ValueError("flops_speedup=2: held-out batches are skimmed to 1.00x at most")

    monkeypatch.setattr(demo_command, "calibrate", refuse)
    with pytest.warns(UserWarning, match="not calibrated: flops_speedup=2"):
        assert main([*arguments, "--limit", "30"]) == 0
    assert stored_figures(tmp_path / "demo")["calibration_shift"] is None
    shutil.rmtree(tmp_path / "work")
    assert main(arguments) == 2 and "skimmed to 1.00x at most" in capsys.readouterr().err
    assert stored_figures(tmp_path / "demo")["train_sentences"] == 30


def test_an_interrupted_run_goes_on_to_the_same(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments) == 0
    whole = load_file(tmp_path / "demo" / "model.safetensors")
    count = stored_figures(tmp_path / "demo")["skim_train_sentences"]
    for folder in ("demo", "work"):
        shutil.rmtree(tmp_path / folder)
    stages: list[tuple[bool, int, bool]] = []
    train_stage = training_run.train_stage

    def first_dense_only(model: Any, tokenizer: Any, examples: TokenizedExamples, *rest: Any, **named: Any) -> Any:
        stages.append((named["skimming"], len(examples), examples.teacher_logits is not None))
        if len(stages) == 2:
            raise KeyboardInterrupt
        return train_stage(model, tokenizer, examples, *rest, **named)

    monkeypatch.setattr(training_run, "train_stage", first_dense_only)
    assert main(arguments) == 130 and main(arguments) == 0
    assert stages == [(False, 40, False), (True, count, True), (True, count, True)]
    found = load_file(tmp_path / "demo" / "model.safetensors")
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_run_does_not_go_on_from_another(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoints would be of other sentences."""
    work = tmp_path / "work"
    (work / "dense").mkdir(parents=True)
    assert main(arguments) == 2
    assert f"--work {work}: holds dense but no settings.json" in capsys.readouterr().err
    shutil.rmtree(work)
    assert main([*arguments, "--limit", "30"]) == 0 and main(arguments) == 2
    assert f"--work {work}: holds a run with other settings: limit 30 -> None" in capsys.readouterr().err
    assert stored_figures(tmp_path / "demo")["train_sentences"] == 30


def test_data_that_are_not_there(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.tsv").unlink()
    assert main(arguments) == 2
    assert f"--data {tmp_path / 'train.tsv'}: no such file" in capsys.readouterr().err
    assert not (tmp_path / "work").exists() and not (tmp_path / "demo").exists()
