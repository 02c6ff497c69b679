"""What transkimmer train and evaluate refuse before they work: options that nothing reads, folders, classes, rows."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GPT2Config, PreTrainedConfig
from transkimmer import add_skimming
from transkimmer.cli import main
from transkimmer.flops import EncoderShape
from transkimmer.tasks import TASKS
from transkimmer.training.kinds import kind_of
from transkimmer.training.output import WRITTEN, prepare_output
from transkimmer.training.recipe import MODEL, SETTINGS, recipe_of
from transkimmer.training.run import Run, hold_out

from ..models.tiny import tiny
from ..models.words import word_tokenizer
from .test_commands import backbone, data, train

__all__ = ["backbone", "data"]  # fixtures


def command(data: Path, output: Path, *options: str) -> list[str]:
    return ["train", "--task", "sst2", "--data", str(data), "--output", str(output), *options]


# Options that nothing would read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mode paper --distillation-weight 1", "--distillation-weight 1.0: --mode paper makes no dense fine-tune to"),
        ("--mode published --state-distillation-weight 1", "--state-distillation-weight 1.0: --mode published makes"),
        ("--mode published --dense-epochs 2", "--dense-epochs 2.0: --mode published makes no dense fine-tune; leave"),
        ("--mode paper --dense-learning-rate 1e-4", "--dense-learning-rate 0.0001: --mode paper makes no dense"),
        ("--flops-speedup 3 --no-aim --calibration none", "--flops-speedup 3.0: is neither aimed at nor calibrated to"),
        ("--flops-speedup 3 --mode published --calibration sampled", "--calibration sampled; leave it out"),
        ("--dense-epochs 2 --dense HERE", "--dense-epochs 2.0: is of a dense fine-tune, which --dense HERE is already"),
        ("--dense HERE --mode dense --dense-learning-rate 1", "--dense-learning-rate 1.0: is of a dense fine-tune"),
        ("--dense HERE --backbone OTHER", "--backbone OTHER: the run starts from --dense HERE; leave one of them out"),
        ("--save-steps 0", "--save-steps 0: must be at least 1"),
        # These are read.
        ("--flops-speedup 3 --no-aim --backbone ./none", "--backbone ./none: no such folder"),
        ("--flops-speedup 3 --calibration none --backbone ./none", "--backbone ./none: no such folder"),
        ("--flops-speedup 3 --mode paper --backbone ./none", "--backbone ./none: no such folder"),
        ("--dense-epochs 2 --distillation-weight 2 --backbone ./none", "--backbone ./none: no such folder"),
    ],
)
def test_options_that_would_not_be_read(
    options: str, message: str, tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [{"HERE": str(backbone)}.get(word, word) for word in options.split()]
    assert main(command(data, tmp_path / "run", *words)) == 2
    assert message.replace("HERE", str(backbone)) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Speedups that no skimming reaches


def reach(config: PreTrainedConfig, width: int, longest: int) -> float:
    """FLOPs of a dense text of `longest` tokens over those of one token per layer and of the predictors, by hand."""
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    layer = {n: n * (4 * d * d + 2 * d * f) + 2 * n * n * d for n in (1, longest)}
    return layers * layer[longest] / (layers * layer[1] + (longest - 1) * (d * width + 2 * width))


@pytest.mark.parametrize(
    ("options", "width", "longest"),
    [
        ("", 64, 80),
        ("--predictor-width 8", 8, 80),
        ("--max-length 16", 64, 16),
        ("--calibration none", 64, 80),
        ("--no-aim", 64, 80),
        ("--mode paper", 64, 80),
        ("--mode published", 64, 80),
    ],
)
def test_a_speedup_out_of_reach(
    options: str,
    width: int,
    longest: int,
    tmp_path: Path,
    backbone: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused before rows are read and a folder is made; what can just be reached is not."""
    most = math.floor(100 * reach(AutoConfig.from_pretrained(backbone), width, longest)) / 100
    given = command(data, tmp_path / "run", "--backbone", str(backbone), *options.split())
    monkeypatch.setattr(Run, "carry_out", lambda run: {"task": "sst2", "recipe": {"mode": run.recipe.mode}})
    for speedup in (1000.0, round(most + 0.01, 2)):
        assert main([*given, "--flops-speedup", str(speedup)]) == 2
        error = capsys.readouterr().err
        assert f"--flops-speedup {speedup}: must be at most {most:.2f}, which one token per layer and the" in error
        assert f"(--predictor-width {width}) lead to on texts of {longest} tokens (--max-length)\n" in error
    assert not (tmp_path / "run").exists()
    assert main([*given, "--flops-speedup", str(most)]) == 0


@pytest.mark.parametrize("options", ["--mode paper", "--mode dense", "--no-aim --calibration sampled"])
def test_a_speedup_that_a_run_is_not_for_is_within_reach(
    options: str, tmp_path: Path, backbone: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With predictors that cost more than any skimming saves, which a run is free to train all the same."""
    wide = [] if "dense" in options else ["--predictor-width", "100000"]
    recipe = recipe_of("corrected", TASKS["sst2"], predictor_width=100_000)
    with pytest.raises(ValueError, match=r"^--flops-speedup 2\.0: must be at most 1\.00, which"):
        recipe.check_speedup(AutoConfig.from_pretrained(backbone))
    monkeypatch.setattr(Run, "carry_out", lambda run: {"task": "sst2", "recipe": {"mode": run.recipe.mode}})
    assert main(command(data, tmp_path / "run", "--backbone", str(backbone), *options.split(), *wide)) == 0


def test_a_speedup_out_of_reach_of_the_held_out_rows(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are shorter than texts may be. Nothing is trained, and the folder is free for another run."""
    given = [*command(data, tmp_path / "run", "--backbone", str(backbone)), "--flops-speedup"]
    assert main([*given, "20"]) == 2
    pattern = r"--flops-speedup 20\.0: must be at most (\S+), which .* lead to on the held-out rows\n$"
    found = re.search(pattern, capsys.readouterr().err)
    assert found is not None and [path.name for path in (tmp_path / "run").iterdir()] == [SETTINGS]
    rows = (data / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    _, held_out = hold_out(rows, recipe_of("corrected", TASKS["sst2"]))
    lengths = torch.tensor([len(row.split()) - 1 + 2 for row in held_out])  # without the label, with [CLS] and [SEP]
    shape = EncoderShape.of(AutoConfig.from_pretrained(backbone), 64)
    assert float(found[1]) == pytest.approx(shape.most_flops_speedup(lengths), abs=0.01)

    def begin(*_: object) -> None:
        raise ValueError("training began")

    monkeypatch.setattr(Run, "dense_model", begin)
    for options in ([found[1]], ["20", "--calibration", "none"]):
        assert main([*given, *options]) == 2
        assert capsys.readouterr().err.endswith("training began\n")


def test_the_most_that_texts_can_be_sped_up() -> None:
    """Shorter ones gain less, whatever the predictors' width, except where the predictors cost more than layers."""
    one = torch.ones(3, 1, dtype=torch.int64)
    for width in (1, 64, 5000, 100_000):
        shape = EncoderShape(3, 64, 128, width)
        for longest in (1, 2, 7, 200):
            found = [shape.flops_speedup(torch.tensor([n]), one) for n in range(1, longest + 1)]
            assert max(1.0, shape.most_flops_speedup(torch.tensor([longest]))) == pytest.approx(max(found))


# Folders


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_of_no_run_is_not_replaced(
    name: str, tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "run" / name / "weights"
    other.parent.mkdir(parents=True)
    other.write_text("of years", encoding="utf-8")
    assert train(backbone, data, tmp_path / "run", "--limit", "8") == 2
    assert f"--output {tmp_path / 'run'}: holds {name} but no {SETTINGS}" in capsys.readouterr().err
    assert other.read_text(encoding="utf-8") == "of years"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


@pytest.mark.parametrize("option", ["--dense", "--backbone"])
def test_a_run_does_not_write_over_what_it_starts_from(
    option: str, tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tmp_path / "run" / "model"
    shutil.copytree(backbone, start)
    assert main(command(data, tmp_path / "run", option, str(start))) == 2
    assert f"{option} {start}: lies in --output {tmp_path / 'run'}" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]
    beside = Run(TASKS["sst2"], recipe_of("corrected", TASKS["sst2"]), str(backbone), tmp_path / "beside")
    shutil.copytree(backbone, beside.output / "start")
    prepare_output(dataclasses.replace(beside, backbone=str(beside.output / "start")), resume=False)


def test_a_run_says_where_its_rows_and_its_weights_come_from(tmp_path: Path, backbone: Path) -> None:
    """And one that did not say it yet is resumed."""
    recipe = recipe_of("corrected", TASKS["20news"])
    job = Run(TASKS["20news"], recipe, None, tmp_path / "run", dense=backbone)
    settings = job.settings()
    assert (settings["data"], settings["backbone"]) == ("SetFit/20_newsgroups", None)
    assert Run(TASKS["20news"], recipe, "mini", tmp_path, tmp_path / "data").settings() == {
        **settings,
        **{"data": str(tmp_path / "data"), "backbone": "mini", "dense": None},
    }
    prepare_output(job, resume=False)
    (tmp_path / "run/skimming").mkdir()
    former = {**settings, "data": None, "backbone": "bert-base-uncased"}
    (tmp_path / "run" / SETTINGS).write_text(json.dumps(former), encoding="utf-8")
    prepare_output(job, resume=True)
    job.data = tmp_path
    with pytest.raises(ValueError, match=f"other settings: data 'SetFit/20_newsgroups' -> '{tmp_path}'"):
        prepare_output(job, resume=True)


# Rows that a dense fine-tune has been trained on


@pytest.mark.parametrize("place", [MODEL, f"dense/{MODEL}"])
@pytest.mark.parametrize(
    ("theirs", "ours", "seen"),
    [
        ({"held_out": 0.1}, {"held_out": 0.1, "seed": 7}, False),
        ({"held_out": 0.2}, {"held_out": 0.1, "limit": 30}, False),
        ({"held_out": 0.1}, {"held_out": 0.2}, True),
        ({"held_out": 0.1, "limit": 30}, {"held_out": 0.1}, True),
        ({}, {"held_out": 0.2}, True),
    ],
)
def test_rows_that_the_dense_model_has_seen_are_not_held_out(
    theirs: dict[str, float], ours: dict[str, float], seen: bool, place: str, tmp_path: Path
) -> None:
    dense, rows, recipe = tmp_path / "first" / place, list(range(60)), recipe_of("corrected", TASKS["sst2"], **ours)
    dense.mkdir(parents=True)
    settings = {"task": "sst2", "recipe": theirs}
    (tmp_path / "first" / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    trained_on, _ = hold_out(rows, recipe_of("corrected", TASKS["sst2"], **theirs))
    _, held_out = hold_out(rows, recipe)
    assert seen == bool(set(trained_on) & set(held_out))
    job = Run(TASKS["sst2"], recipe, None, tmp_path / "second", dense=dense)
    if seen:
        kept = "its run held out [36] rows and trained on others of the (6|12) that are held out now"
        own = r"take its --held-out 0\.1 and (no --limit|--limit 30)$"
        with pytest.raises(ValueError, match=f"--dense {dense}: {kept}; {own}"):
            job._check_held_out(rows, held_out)
    else:
        job._check_held_out(rows, held_out)
    (tmp_path / "first" / SETTINGS).write_text(json.dumps({**settings, "task": "rte"}), encoding="utf-8")
    job._check_held_out(rows, held_out)


def test_held_out_rows_are_looked_at_before_training(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(backbone, tmp_path / "first/model")
    settings = {"task": "sst2", "recipe": recipe_of("dense", TASKS["sst2"]).to_dict()}
    (tmp_path / "first" / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    assert train(backbone, data, tmp_path / "run", "--dense", str(tmp_path / "first/model"), "--held-out", "0.5") == 2
    assert "its run held out 6 rows and trained on others of the 30" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [SETTINGS]


# Classes and types


def test_a_backbone_of_a_type_that_cannot_skim(
    tmp_path: Path, backbone: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said before a dense fine-tune is made of it."""
    other = tmp_path / "other"
    shutil.copytree(backbone, other)
    GPT2Config(n_layer=1).save_pretrained(other)
    assert main(command(data, tmp_path / "run", "--backbone", str(other))) == 2
    assert f"--backbone {other}: is of type 'gpt2'; must be one of bert, roberta," in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "names", "fits"),
    [
        ("sst2", ("negative", "positive"), True),
        ("sst2", ("POSITIVE", "NEGATIVE"), False),
        ("sst2", ("good", "bad"), True),
        ("sst2", ("LABEL_1", "LABEL_0"), True),
        ("mnli", ("Contradiction", "neutral", "entailment"), False),
        ("rte", ("entailment", "not entailment"), True),
        ("rte", ("not-entailment", "entailment"), False),
    ],
)
def test_classes_in_another_order(task: str, names: tuple[str, ...], fits: bool, tmp_path: Path) -> None:
    tiny("bert", "sequence", id2label=dict(enumerate(names))).save_pretrained(tmp_path)
    kind = kind_of(TASKS[task])
    if fits:
        assert kind.load(tmp_path, "--model").config.num_labels == len(names)
        return
    wanted = f"{TASKS[task].title}: {', '.join(TASKS[task].classes)}"
    message = f"--model {tmp_path}: its classes are {', '.join(names)}; the order must be that of {wanted}"
    with pytest.raises(ValueError, match=message):
        kind.load(tmp_path, "--model")


# Evaluation


@pytest.mark.parametrize("option", ["--batch-size 0", "--repeats -1", "--threads 0"])
def test_numbers_that_are_too_small(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--task", "sst2", "--model", "none", *option.split()]) == 2
    assert f"{option}: must be at least {0 if option == '--repeats -1' else 1}\n" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--check-training-forward", "--html", "--png"])
def test_what_needs_a_model_that_skims(
    option: str, tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said before rows are read; there are none."""
    if option == "--png":
        pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib, an extra")
    given = option if option == "--check-training-forward" else f"{option} {tmp_path / 'file'}"
    evaluate = ["evaluate", "--task", "sst2", "--data", str(tmp_path), "--model", str(backbone), *given.split(" ")]
    assert main(evaluate) == 2
    assert capsys.readouterr().err.endswith(f"transkimmer evaluate: {given}: the model does not skim\n")


def test_evaluation_takes_the_kernels_it_is_given(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_skimming(tiny("bert", "sequence")).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    evaluate = ["evaluate", "--task", "sst2", "--data", str(data), "--model", str(tmp_path), "--repeats", "0"]
    assert main([*evaluate, "--kernels", "reference"]) == 0
    assert main([*evaluate, "--kernels", "abacus"]) == 2
    assert "kernels" in (error := capsys.readouterr().err) and "abacus" in error


@pytest.mark.parametrize(("source", "warns"), [("rows", 0), (None, 0), ("stanfordnlp/sst2", 1)])
def test_a_dense_fine_tune_of_rows_from_elsewhere_is_warned_of(
    source: str | None, warns: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """They may stand in another order, so that other ones were held out."""
    dense = tmp_path / "dense" / MODEL
    dense.mkdir(parents=True)
    job = Run(TASKS["sst2"], recipe_of("corrected", TASKS["sst2"]), None, tmp_path / "run", Path("rows"), dense)
    settings = {**job.settings(), "data": source, "dense": None}
    (dense.parent / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    rows = list(range(40))
    job._check_held_out(rows, hold_out(rows, job.recipe)[1])
    assert [str(w.message).startswith(f"--dense {dense}: its run read rows from {source}") for w in recwarn] == [
        True
    ] * warns
