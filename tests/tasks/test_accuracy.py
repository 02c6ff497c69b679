"""The table of experiments on a tiny model: its rows, what an interruption leaves, and a file that is never half."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch
from transkimmer.training import SteadyTrainer
from transkimmer.training.recipe import Recipe

from benchmarks.accuracy import __main__ as accuracy
from benchmarks.accuracy import stored, training, trials
from benchmarks.accuracy.options import setting

from ..models.tiny import tiny
from ..models.words import word_tokenizer

QUICK = {"dense_epochs": 2.0, "epochs": 2.0, "batch_size": 8, "bias_init": 1.0}


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A backbone, 40 and 8 rows of RTE's format, and where results go."""
    tiny("bert", "sequence").save_pretrained(tmp_path / "tiny")
    word_tokenizer().save_pretrained(tmp_path / "tiny")
    words = random.Random(0)
    (tmp_path / "data/RTE").mkdir(parents=True)
    for name, count in (("train.tsv", 40), ("dev.tsv", 8)):
        rows = ["index\tsentence1\tsentence2\tlabel"]
        for number in range(count):
            text = " ".join(words.choices(["dog", "cat", "runs", "sleeps", "un"], k=words.randint(2, 9)))
            rows.append(f"{number}\t{text}\t" + ("happy\tentailment" if number % 2 else "sad\tnot_entailment"))
        (tmp_path / "data/RTE" / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    monkeypatch.setattr(training, "size_settings", lambda backbone, mode, task: QUICK)
    places = {"--data": "data", "--backbone": "tiny", "--results": "accuracy.csv", "--work": "work"}
    named = [part for option, place in places.items() for part in (option, str(tmp_path / place))]
    return [*named, "--tasks", "rte", "--seeds", "1", "--speedups", "1", "99"]


def test_every_training_gives_its_rows_and_leaves_nothing_else(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy.main([*arguments, "--plan"])
    names = ("dense-seed1", "corrected-seed1-skim_weight=4.0", "published-seed1-skim_weight=0.8")
    total = "total of 3: about 0 s (0.0 h), 3 of them not known"
    assert capsys.readouterr().out.splitlines() == [*(f"tiny/rte/{name}: ? s" for name in names), total]
    accuracy.main([*arguments, "--modes", "dense", "corrected"])
    assert "skims to" in capsys.readouterr().err  # a speedup of 99 is out of reach
    rows = stored.read(tmp_path / "accuracy.csv")
    found = [(row["mode"], row["decision"], row["calibrated_to"]) for row in rows]
    assert found == [
        ("dense", "", ""),
        ("corrected", "argmax", ""),
        ("corrected", "sample", ""),
        ("corrected", "threshold", "1"),
    ]
    assert all(row["metric"] == "accuracy" and row["dense"] == rows[0]["value"] for row in rows)
    assert [row["forward_value"] == row["value"] for row in rows if row["forward_value"]] == [True]
    assert 0 < float(rows[1]["forward_difference"]) < 1e-4 and float(rows[1]["forward_agreement"]) == 1
    for row in rows[1:]:
        kept = json.loads(row["tokens_kept"])
        assert len(kept) == 3 and all(0 < share <= 1 for share in kept)
        # Padded to 256 tokens, the dense model has far more to do.
        assert float(row["flops_speedup_padded"]) > 10 * float(row["flops_speedup"])
    assert not list((tmp_path / "work").rglob("*.safetensors"))
    accuracy.main([*arguments, "--plan"])
    first, total = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny/rte/published-seed1-skim_weight=0.8: about") and total.startswith(
        "total of 1: about "
    )
    without_data = [*arguments[2:], "--plan", "--seeds", "2"]
    accuracy.main(without_data)  # by the rows of the other seed
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1][:5] for line in lines] == ["about", "about", "? s", "about"]
    with pytest.raises(SystemExit):
        accuracy.main(arguments[2:])
    assert "--data: is needed except for --plan" in capsys.readouterr().err


class _Killed(BaseException):
    """Not caught by anything, like a signal."""


def test_an_interrupted_training_goes_on_and_is_timed_later(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = SteadyTrainer.training_step
    steps: list[tuple[str, int]] = []

    def counted(self: SteadyTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        stage, number = Path(self.args.output_dir).name, self.state.global_step
        steps.append((stage, number))
        if steps.count(("skimming", 5)) == 1 and (stage, number) == ("skimming", 5):
            raise _Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SteadyTrainer, "training_step", counted)
    arguments += ["--modes", "dense", "corrected", "--keep", "--set", "skim_weight=3", "temperature=0.5"]
    arguments += ["pruned_training=true"]
    with pytest.raises(_Killed):
        accuracy.main(arguments)
    assert [row["mode"] for row in stored.read(tmp_path / "accuracy.csv")] == ["dense"]
    first = len(steps)
    accuracy.main(arguments)
    # 36 rows, batches of 8, 2 epochs: 10 steps, a checkpoint after every second.
    assert steps[first:] == [("skimming", number) for number in range(4, 10)]
    rows = stored.read(tmp_path / "accuracy.csv")
    training = {(row["mode"], row["skim_weight"], row["pruned"]) for row in rows[1:]}
    assert training == {("corrected temperature=0.5", "3", "True")}
    assert [path.name for path in (tmp_path / "work/tiny/rte").glob("corrected*")] == [
        "corrected,temperature=0.5-seed1-skim_weight=3-pruned=True"
    ]
    # Trained in two parts, it has no time of its own.
    assert all(row["wall_clock_speedup"] == row["seconds_train"] == "" for row in rows[1:])
    accuracy.main([*arguments, "--time", "--repeats", "1"])
    timed = stored.read(tmp_path / "accuracy.csv")
    assert [float(row["wall_clock_speedup"]) > 0 for row in timed if row["decision"] in ("argmax", "threshold")] == [
        True
    ] * 2
    assert [row["value"] for row in timed] == [row["value"] for row in rows]


def test_the_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "accuracy.csv"
    row = {"task": "rte", "backbone": "tiny", "mode": "dense", "seed": 1, "skim_weight": None, "pruned": None}
    point = {**row, "decision": None, "calibrated_to": None, "value": 1 / 3, "tokens_kept": [1.0, 0.12345]}
    stored.add(path, [point])
    before = path.read_bytes()

    def full(*names: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transkimmer_kernels.files.os.replace", full)
        with pytest.raises(OSError, match="no space"):
            stored.add(path, [{**point, "seed": 2}])
    assert path.read_bytes() == before
    stored.add(path, [{**point, "value": 0.5}, {**point, "seed": 2}])
    first, second = stored.read(path)
    assert (first["value"], second["value"], second["tokens_kept"]) == ("0.5", "0.333333", "[1.0, 0.1235]")
    path.write_text(path.read_text(encoding="utf-8") + "half a row,\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 4: has 2 values, must have 25"):
        stored.read(path)


def test_settings_must_be_a_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(setting("skim_weight=2")[1], int) and "skim_weight" in Recipe.__dataclass_fields__
    with pytest.raises(SystemExit):
        accuracy.parse(["--data", ".", "--set", "skim_wait=2"])
    assert "skim_wait is no setting of a recipe" in capsys.readouterr().err


def test_a_trial_looks_at_held_out_rows_only(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy.main([*arguments, "--modes", "dense", "--keep"])
    dense = tmp_path / "work/tiny/rte/dense-seed1/model"
    splits: list[str] = []
    load = trials.load_split
    monkeypatch.setattr(
        trials, "load_split", lambda task, split, data: (splits.append(split), load(task, split, data))[1]
    )
    results = tmp_path / "trials.csv"
    trial = ["--task", "rte", "--data", arguments[1], "--dense", str(dense), "--results", str(results)]
    trial += [
        "--work",
        str(tmp_path / "trials"),
        "--set",
        "epochs=1",
        "batch_size=8",
        "aim=true",
        "bias_init=1",
        "--speedups",
        "1",
    ]
    for _ in range(2):
        trials.main(trial)
    assert splits == ["train"] * 2 and not list((tmp_path / "trials").rglob("*.safetensors"))
    with results.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["decision"] for row in rows] == ["sample", "argmax", "threshold"] * 2
    (held_out,) = {row["dense"] for row in rows}
    (row,) = stored.read(tmp_path / "accuracy.csv")
    assert float(held_out) == pytest.approx(float(row["held_out_value"]), rel=1e-5)
    assert json.loads(rows[0]["settings"]) == {"aim": True, "batch_size": 8, "bias_init": 1, "epochs": 1}
    assert [row["value"] for row in rows[:3]] == [row["value"] for row in rows[3:]]
