"""transkimmer train and evaluate on a tiny model: what they write, resume and refuse."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, trainer_utils
from transkimmer import add_skimming, from_pretrained
from transkimmer.cli import main
from transkimmer.flops import EncoderShape
from transkimmer.skimming import skimming_of
from transkimmer.tasks import TASKS
from transkimmer.training import SteadyTrainer
from transkimmer.training.output import prepare_output
from transkimmer.training.recipe import SETTINGS, recipe_of
from transkimmer.training.run import Run, hold_out

from ..models.tiny import tiny
from ..models.words import word_tokenizer

QUICK = ["--batch-size", "8", "--epochs", "3", "--save-steps", "4", "--bias-init", "1"]
QUICK += ["--max-length", "8"]  # which cuts some texts, and is what `evaluate` cuts them to then


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    tiny("bert", "sequence").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 and 12 sentences of SST-2's format: happy ones are positive."""
    folder = tmp_path_factory.mktemp("data")
    words = random.Random(0)
    for name, count in (("train.tsv", 60), ("dev.tsv", 12)):
        rows = ["sentence\tlabel"]
        for number in range(count):
            text = words.choices(["dog", "cat", "runs", "sleeps", "un"], k=words.randint(2, 9))
            rows.append(" ".join([*text, "happy" if number % 2 else "sad"]) + f"\t{number % 2}")
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def train(backbone: Path, data: Path, output: Path, *options: str, task: str = "sst2") -> int:
    """With what `QUICK` says, and what else is read beside `options`."""
    arguments = ["train", "--task", task, "--data", str(data), "--output", str(output), *QUICK]
    arguments += [] if "--dense" in options else ["--backbone", str(backbone)]
    arguments += [] if {"--dense", "paper", "published"} & set(options) else ["--dense-epochs", "2"]
    arguments += [] if "--calibration" in options else ["--flops-speedup", "1"]
    return main([*arguments, *options])


def test_a_run_from_start_to_finish(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(backbone, data, tmp_path / "run") == 0
    document = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    assert document["rows"] == {"train": 54, "held_out": 6, "dev": 12}
    assert document["dev"]["threshold"]["examples"] == 12
    assert set(document["dense_dev"]["metrics"]) == {"accuracy"}
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
    steps = [step for step in document["curves"]["skimming"] if "loss" in step]
    assert len(steps) >= 10 and all(
        {"task_loss", "skim_loss", "keep_threshold/layer_02"} <= set(step) for step in steps
    )
    assert "loss" in document["curves"]["dense"][0]
    assert train(backbone, data, tmp_path / "run") == 2
    assert "holds a run already; go on with --resume" in capsys.readouterr().err
    assert train(backbone, data, tmp_path / "run", "--resume", "--seed", "1") == 2
    assert "other settings: seed 42 -> 1" in capsys.readouterr().err
    figures = tmp_path / "figures.json"
    evaluate = ["evaluate", "--model", str(tmp_path / "run"), "--task", "sst2", "--data", str(data), "--repeats", "1"]
    assert main([*evaluate, "--check-training-forward", "--json", str(figures)]) == 0
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert found["metrics"] == document["dev"]["threshold"]["metrics"]
    assert found["flops_speedup"] == pytest.approx(document["dev"]["threshold"]["flops_speedup"])
    assert found["training_forward"]["max_difference"] <= 1e-4 * found["training_forward"]["max_logit"]
    assert found["training_forward"]["metrics"] == found["metrics"] and found["training_forward"]["agreement"] == 1
    assert found["counted_flops"] == found["executed_flops"] > 0
    assert found["padded_flops_speedup"] > found["flops_speedup"]
    assert found["wall_clock_speedup"] > 0 and found["spread"] is None
    printed = capsys.readouterr().out
    assert "| spread of the timing | – |" in printed and printed.endswith(f"wrote {figures}\n")


def test_a_run_that_predicts_numbers(tmp_path: Path, backbone: Path) -> None:
    for name, count in (("sts-train.tsv", 40), ("sts-dev.tsv", 10)):
        rows = [f"{number % 11 / 2}\tdog {'happy ' * (number % 11)}\tcat sad" for number in range(count)]
        (tmp_path / name).write_text("\n".join(["score\tsentence1\tsentence2", *rows]) + "\n", encoding="utf-8")
    options = ["--epochs", "1", "--dense-epochs", "1", "--max-length", "16"]
    assert train(backbone, tmp_path, tmp_path / "run", *options, task="stsb") == 0
    document = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    correlations = document["dev"]["threshold"]["metrics"]
    assert set(correlations) == set(document["dense_dev"]["metrics"]) == {"pearson", "spearman"}
    assert all(correlations.values()), "a class, the same for every row, would correlate with nothing"
    config = AutoConfig.from_pretrained(tmp_path / "run/model")
    assert (config.problem_type, config.num_labels) == ("regression", 1)
    evaluate = ["evaluate", "--model", str(tmp_path / "run"), "--task", "stsb", "--data", str(tmp_path)]
    figures = tmp_path / "figures.json"
    assert main([*evaluate, "--repeats", "0", "--check-training-forward", "--json", str(figures)]) == 0
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert found["metrics"] == correlations and found["training_forward"]["agreement"] is None


def test_a_picture_of_texts(
    tmp_path: Path, backbone: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib, an extra")
    add_skimming(tiny("bert", "sequence")).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    picture = tmp_path / "texts.png"
    evaluate = ["evaluate", "--task", "sst2", "--data", str(data), "--repeats", "0", "--png", str(picture)]
    assert main([*evaluate, "--model", str(tmp_path / "model")]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*evaluate, "--model", str(backbone)]) == 2
    assert f"--png {picture}: the model does not skim" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*evaluate, "--model", str(tmp_path / "model")]) == 2
    assert f"--png {picture}: needs matplotlib" in capsys.readouterr().err


def test_texts_are_shown_as_they_were_cut(tmp_path: Path) -> None:
    """Their tokenizer, like many a saved one, knows no limit."""
    add_skimming(tiny("bert", "sequence")).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\n" + "dog " * 200 + "\t1\n", encoding="utf-8")
    evaluate = ["evaluate", "--model", str(tmp_path / "model"), "--task", "sst2", "--data", str(tmp_path)]
    page = tmp_path / "page.html"
    for options, words in (
        ([], tiny("bert", "sequence").config.max_position_embeddings - 2),
        (["--max-length", "8"], 6),
    ):
        assert main([*evaluate, "--repeats", "0", "--html", str(page), *options]) == 0
        assert page.read_text(encoding="utf-8").count("dog") == words


class _Killed(BaseException):
    """Not caught by anything, like a signal."""


@pytest.mark.parametrize("stage", ["dense", "skimming"])
def test_a_resumed_run_ends_with_the_same_result(
    tmp_path: Path, backbone: Path, data: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    assert train(backbone, data, tmp_path / "whole") == 0
    step = SteadyTrainer.training_step

    def killed(self: SteadyTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        if Path(self.args.output_dir).name == stage and self.state.global_step == 10:
            raise _Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SteadyTrainer, "training_step", killed)
    with pytest.raises(_Killed):
        train(backbone, data, tmp_path / "parts")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "parts" / stage).glob("checkpoint-*")] == ["checkpoint-8"]
    # A checkpoint whose writing was cut off does not count.
    cut_off = tmp_path / "parts" / stage / "checkpoint-10"
    shutil.copytree(cut_off.with_name("checkpoint-8"), cut_off)
    (cut_off / "trainer_state.json").unlink()
    warnings: list[str] = []
    monkeypatch.setattr(trainer_utils.logger, "warning_once", warnings.append, raising=False)
    assert train(backbone, data, tmp_path / "parts", "--resume") == 0
    assert not [warning for warning in warnings if "do not match" in warning]
    whole, parts = (load_file(tmp_path / run / "model/model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def test_a_loss_that_is_no_number_stops_the_run(
    tmp_path: Path, backbone: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = SteadyTrainer.compute_loss

    def poisoned(self: SteadyTrainer, *args: object, **kwargs: object) -> object:
        return loss(self, *args, **kwargs) * (float("nan") if self.state.global_step == 6 else 1)

    monkeypatch.setattr(SteadyTrainer, "compute_loss", poisoned)
    assert train(backbone, data, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "dense training stopped: the loss is nan at step 7" in error
    assert "The last good checkpoint is" in error and "checkpoint-4" in error
    kept = load_file(tmp_path / "run/dense/checkpoint-4/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_weights_that_the_last_step_has_ruined_are_not_kept(
    tmp_path: Path, backbone: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss is known before a step; what the last one makes of the weights, only afterwards."""
    trained = SteadyTrainer.train

    def ruined(self: SteadyTrainer, *args: object, **kwargs: object) -> object:
        result = trained(self, *args, **kwargs)
        next(self.model.parameters()).data.fill_(float("inf"))
        return result

    monkeypatch.setattr(SteadyTrainer, "train", ruined)
    assert train(backbone, data, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "dense training stopped: the loss is nan after the last step. There is no good checkpoint;" in error
    assert not (tmp_path / "run/dense/model").exists()


def test_an_output_that_cannot_be_written(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert train(backbone, data, tmp_path / "file" / "run") == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_recipes() -> None:
    published = recipe_of("published", TASKS["rte"], seed=3)
    assert (published.skim_weight, published.temperature, published.bias_init) == (0.8, 1.0, 5.0)
    assert (published.decision, published.skim_attention, published.seed) == ("sample", "published", 3)
    assert recipe_of("paper", TASKS["rte"]).temperature == 0.1
    assert recipe_of("paper", TASKS["rte"], flops_speedup=1.5).calibration == "speedup"
    for option, value in (("epochs", 0.0), ("batch_size", 0), ("held_out", 1.0), ("calibration", "guess")):
        with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} {value}: must be"):
            recipe_of("corrected", TASKS["rte"], **{option: value})


def test_the_same_rows_are_held_out_whatever_the_seed() -> None:
    rows = list(range(100))
    (train_1, held_1), (train_2, held_2) = (
        hold_out(rows, recipe_of("corrected", TASKS["rte"], seed=seed)) for seed in (1, 2)
    )
    assert held_1 == held_2 and len(held_1) == 10
    assert sorted(train_1 + held_1) == sorted(train_2 + held_2) == rows


def test_a_dense_fine_tune_takes_no_settings_of_skimming(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--task", "sst2", "--data", str(data), "--backbone", str(backbone), "--mode", "dense"]
    arguments += ["--output", str(tmp_path / "run"), "--dense-epochs", "1", "--limit", "8"]
    for option, refused in ((["--flops-speedup", "3"], "--flops-speedup 3.0"), (["--no-aim"], "--aim False")):
        assert main([*arguments, *option]) == 2
        assert f"{refused}: is of skimming; --mode must be one of corrected, paper" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(arguments) == 0
    assert json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["dense_dev"]["metrics"]


def test_pruned_training_is_a_setting(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe_of("corrected", TASKS["rte"], pruned_training=True).skim_config().pruned_training
    assert train(backbone, data, tmp_path / "run", "--pruned-training", "--mode", "published") == 2
    assert "--pruned-training: does not go with --mode published, where" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_aims(tmp_path: Path, backbone: Path, data: Path) -> None:
    assert train(backbone, data, tmp_path / "run", "--aim", "--flops-speedup", "1.5", "--predictor-width", "8") == 0
    model = from_pretrained(tmp_path / "run/model", AutoModelForSequenceClassification)
    config, found = model.config, skimming_of(model).config
    assert found.predictor_width == 8
    shape = EncoderShape(config.num_hidden_layers, config.hidden_size, config.intermediate_size, 8)
    assert found.skim_target == pytest.approx(shape.share_at(1.5)) and 0.5 < found.skim_target < 1


def test_a_run_from_before_a_setting_existed_is_resumed(tmp_path: Path, backbone: Path, data: Path) -> None:
    """It had the setting's default."""
    plain, pruned = (
        Run(TASKS["sst2"], recipe_of("corrected", TASKS["sst2"], pruned_training=option), str(backbone), tmp_path, data)
        for option in (False, True)
    )
    prepare_output(plain, resume=False)
    settings = json.loads((tmp_path / SETTINGS).read_text(encoding="utf-8"))
    del settings["recipe"]["pruned_training"]
    (tmp_path / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "skimming").mkdir()
    prepare_output(plain, resume=True)
    with pytest.raises(ValueError, match="other settings: pruned_training False -> True"):
        prepare_output(pruned, resume=True)


def test_what_failed_before_it_trained_leaves_its_folder_free(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(backbone, tmp_path / "missing", tmp_path / "run") == 2
    assert "no such folder" in capsys.readouterr().err
    assert train(backbone, data, tmp_path / "run", "--limit", "8") == 0


def test_no_more_tokens_than_a_model_has_positions(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    positions = tiny("bert", "sequence").config.max_position_embeddings
    message = f"--max-length {positions + 1}: must be at most {positions}, the positions that the model has"
    assert positions < 512
    assert train(backbone, data, tmp_path / "run", "--max-length", str(positions + 1)) == 2
    assert message in capsys.readouterr().err
    evaluate = ["evaluate", "--model", str(backbone), "--task", "sst2", "--data", str(data)]
    assert main([*evaluate, "--max-length", str(positions + 1)]) == 2
    assert message in capsys.readouterr().err
    assert main(evaluate) == 0, "the default is for models with more positions, too"


def test_training_does_not_start_from_a_skimming_model(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_skimming(tiny("bert", "sequence")).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    assert train(backbone, data, tmp_path / "run", "--dense", str(tmp_path / "model")) == 2
    assert f"--dense {tmp_path / 'model'}: is a skimming model; must be" in capsys.readouterr().err
    assert train(tmp_path / "model", data, tmp_path / "run") == 2
    assert f"--backbone {tmp_path / 'model'}: is a skimming model; must be" in capsys.readouterr().err
    assert train(backbone, data, tmp_path / "run", "--dense", str(backbone), "--mode", "paper") == 2
    assert f"--dense {backbone}: --mode paper starts from --backbone; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_backbone_of_another_task_gets_a_new_head(tmp_path: Path, data: Path) -> None:
    tiny("bert", "sequence", num_labels=3).half().save_pretrained(tmp_path / "three")
    word_tokenizer().save_pretrained(tmp_path / "three")
    places = ["--backbone", str(tmp_path / "three"), "--data", str(data), "--output", str(tmp_path / "run")]
    assert main(["train", "--task", "sst2", "--mode", "dense", "--dense-epochs", "0.1", *places]) == 0
    weights = load_file(tmp_path / "run/model/model.safetensors")
    assert weights["classifier.weight"].size(0) == 2
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}, "a file of 16 bits is trained in fp32"


def test_draws_are_calibrated_to_by_a_threshold(tmp_path: Path, backbone: Path, data: Path) -> None:
    options = ["--mode", "published", "--epochs", "0.2", "--calibration", "sampled", "--bias-init", "1"]
    assert train(backbone, data, tmp_path / "run", *options) == 0
    document = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    found = document["calibration"]
    assert found["method"] == "sampled"
    assert found["argmax_flops_speedup"] < 1 < found["flops_speedup"], "the argmax keeps all, draws do not"
    assert from_pretrained(tmp_path / "run/model").skimming.config.decision == "sample"


def test_a_model_of_another_task_is_judged_with_a_note(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    add_skimming(tiny("bert", "sequence")).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / SETTINGS).write_text(json.dumps({"task": "rte", "recipe": {"max_length": 4}}), encoding="utf-8")
    evaluate = ["evaluate", "--model", str(tmp_path), "--data", str(data), "--repeats", "0"]
    assert main([*evaluate, "--task", "sst2"]) == 0
    assert f"note: --model {tmp_path} was trained on RTE; --task is SST-2" in capsys.readouterr().err
    assert not any("are cut to" in str(warning.message) for warning in recwarn), "how RTE was cut is no matter here"


def test_there_has_to_be_something_to_resume(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, what in ((tmp_path / "mistyped", "no such folder"), (tmp_path, "holds no run")):
        assert train(backbone, data, folder, "--resume") == 2
        assert f"--resume: --output {folder}: {what}; leave out --resume" in capsys.readouterr().err
    assert not (tmp_path / "mistyped").exists() and not list(tmp_path.iterdir())


def test_a_place_to_write_to_is_looked_at_first(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ["evaluate", "--model", str(backbone), "--task", "sst2", "--data", str(data)]
    for option, path in (("--json", tmp_path / "missing/a.json"), ("--html", tmp_path)):
        assert main([*evaluate, option, str(path)]) == 2
        found = capsys.readouterr()
        assert f"{option} {path}: must be a file in a folder that exists" in found.err and not found.out


def test_a_file_that_is_no_text_is_named(tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_bytes(b"sen\xc8\x00tence\tlabel\n")
    assert train(backbone, tmp_path, tmp_path / "run") == 2
    assert f"{tmp_path / 'train.tsv'}, after line 0: 'utf-8' codec" in capsys.readouterr().err
