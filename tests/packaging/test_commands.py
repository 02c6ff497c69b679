"""What every `transkimmer` command is told: where options stand, what they name, and what their help says of them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import RepositoryNotFoundError
from transkimmer import arguments
from transkimmer.cli import main
from transkimmer.tasks import TASKS
from transkimmer.training.command import OPTIONS
from transkimmer.training.recipe import MODES, Recipe, recipe_of

TRAIN = ["train", "--task", "rte", "--output", "run"]


def refusal(given: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        status: Any = main(given)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    return capsys.readouterr().err


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(given: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("transkimmer.bench.command.run", run)
    assert main(["bench"]) == 130 and capsys.readouterr().err == "transkimmer bench: interrupted\n"


# Names of models


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("", "'': no such folder; must be a folder that save_pretrained wrote, or a model's name on"),
        ("runs/a/b", "runs/a/b: no such folder; must be"),
        ("./nowhere", "./nowhere: no such folder; must be"),
        ("here/nowhere", "here/nowhere: no such folder; must be"),
        ("empty", "empty: the folder has no config.json; must be"),
        ("half", "half: the folder has no weights; must be"),
        ("file", "file: no such folder; must be"),
    ],
)
def test_a_model_that_is_not_there(
    name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("here", "empty", "half"):
        (tmp_path / folder).mkdir()
    for file in ("file", "half/config.json"):
        (tmp_path / file).write_text("{}", encoding="utf-8")
    monkeypatch.setattr(arguments, "_ask_the_hub", lambda *_: pytest.fail("the hub was asked"))
    assert f"train: --backbone {what}" in refusal([*TRAIN, "--backbone", name], capsys)
    for command in (["bench", "model"], ["profile"], ["bench", "--schedule", "mrpc", "--lengths", "mrpc"]):
        assert f"--model {what}" in refusal([*command, "--model", name], capsys)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["empty", "file", "half", "here"]


def test_a_folder_needs_a_tokenizer_to_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_text("{}", encoding="utf-8")
    what = f"{tmp_path}: the folder has no tokenizer; must be"
    assert f"--backbone {what} a folder that" in refusal([*TRAIN, "--backbone", str(tmp_path)], capsys)
    assert f"--dense {what} a folder with a dense fine-tune" in refusal([*TRAIN, "--dense", str(tmp_path)], capsys)
    evaluate = ["evaluate", "--task", "rte", "--model"]
    assert f"--model {what} a folder with a trained model" in refusal([*evaluate, str(tmp_path)], capsys)
    assert "--model nowhere: no such folder; must be a folder with a trained" in refusal([*evaluate, "nowhere"], capsys)


def test_a_run_names_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    assert f"; did you mean {model}?" in refusal(["bench", "model", "--model", str(tmp_path)], capsys)


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []
    response: Any = SimpleNamespace(headers={}, request=None)
    errors: dict[str, Exception] = {
        "some/model": RepositoryNotFoundError("not there", response=response),
        "other/model": OSError("no route\nat all"),
    }

    def model_info(self: object, name: str, timeout: float) -> None:
        asked.append(name)
        assert timeout <= 10
        raise errors[name]

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    assert refusal([*TRAIN, "--backbone", "some/model"], capsys) == (
        "transkimmer train: --backbone some/model: no such folder, and no such model on the hub\n"
    )
    error = refusal(["profile", "--model", "other/model"], capsys)
    assert "--model other/model: no such folder, and the hub cannot be asked (no route); must be" in error
    assert asked == list(errors)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    arguments.check_pretrained("--model", "some/model")
    assert asked == list(errors)


# What is named in an error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--temperature", "-1"], "--temperature -1.0: must be a finite number > 0"),
        (["--skim-weight", "nan"], "--skim-weight nan: must be a finite number >= 0"),
        (["--flops-speedup", "0.99"], "--flops-speedup 0.99: must be a finite number >= 1"),
        (["--flops-speedup", "inf"], "--flops-speedup inf: must be a finite number >= 1"),
        (["--predictor-learning-rate", "2"], "--predictor-learning-rate 2.0: must be at most 1"),
    ],
)
def test_errors_name_options(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal([*TRAIN, *given], capsys) == f"transkimmer train: {message}\n"


def test_options_of_bench_stand_behind_its_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal(["bench", "--dtype", "bf16", "model", "--lengths", "sst2"], capsys)
    assert "bench model: options must stand behind 'model', not before it" in error
    monkeypatch.setattr(sys, "argv", ["transkimmer", "bench", "--repeats", "5", "training"])
    with pytest.raises(SystemExit):
        main()
    assert "options must stand behind 'training'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "first", "second"),
    [
        (["bench"], "json", "html"),
        (["profile"], "json", "trace"),
        (["evaluate", "--task", "rte", "--model", "nowhere"], "markdown", "answers"),
    ],
)
def test_two_outputs_are_two_files(
    command: list[str], first: str, second: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    same = tmp_path / "folder/../x"
    error = refusal([*command, f"--{first}", str(tmp_path / "x"), f"--{second}", str(same)], capsys)
    assert f"--{second} {same}: must be another file than --{first}" in error
    missing = tmp_path / "missing/x"
    assert f"--{first} {missing}: must be a file in a folder" in refusal([*command, f"--{first}", str(missing)], capsys)
    assert not (tmp_path / "x").exists()


# Help


def test_the_defaults_in_the_help_of_train_are_true() -> None:
    recipes = [recipe_of(mode, task) for mode in MODES for task in TASKS.values()]
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    for name, (_, _, said) in OPTIONS.items():
        found = {getattr(recipe, name) for recipe in recipes}
        assert (found == {defaults[name]} and name not in ("limit", "predictor_width")) == (
            said is None or name == "flops_speedup"
        ), name
    by_task = {(recipe.max_length, recipe.doc_stride) for recipe in recipes}
    assert by_task == {(512, None), (384, 128)}
    assert {recipe.mode for recipe in recipes if recipe.calibration == "speedup"} == {"corrected", "dense"}


def test_every_default_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for command, defaults in (
        (["train"], ["bert-base-uncased", "2.0 in mode corrected", "42", "128"]),
        (["evaluate"], ["dev", "32", "auto", "3"]),
        (["bench"], ["fp32", "5", "512"]),
        (["bench", "model"], ["1 8 32", "mrpc", "60.0"]),
    ):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        text = capsys.readouterr().out
        assert [default for default in defaults if f"default: {default}" not in text] == []
        assert "None" not in text
