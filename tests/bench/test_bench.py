"""The bench command: what it is fed, what it computes, what it writes and what it refuses."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transkimmer import SkimConfig, add_skimming
from transkimmer.bench import command, show, workload
from transkimmer.bench.contenders import KEEP_ALL, PADDED, PLAIN, SKIMMING, Contender
from transkimmer.bench.timing import Limits, Row, compare, paired_speedup, time_in_turn
from transkimmer.cli import main
from transkimmer.flops import EncoderShape

from ..clock import Clock
from ..models.tiny import LAYERS, VOCABULARY, tiny
from ..models.words import word_tokenizer

RATIOS = [1.0, 0.6, 0.2]
LENGTHS = [9, 4, 14, 6, 11, 5, 3, 20]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A dense classifier with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    tiny("bert", "sequence").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# What is timed


def test_schedules_by_name_and_by_number() -> None:
    assert workload.parse_schedule("mrpc", 2) == pytest.approx([0.787, 0.787**2])
    assert workload.parse_schedule("1,0.5, .25", 3) == [1, 0.5, 0.25]


@pytest.mark.parametrize(("text", "message"), [("fast", "--schedule fast: .*mrpc"), ("1,.5", "2 ratios.*3 layers")])
def test_bad_schedules(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload.parse_schedule(text, 3)


def test_known_lengths_are_cut_at_the_longest() -> None:
    lengths = workload.lengths_of("imdb", None, 128)
    assert len(lengths) == len(workload.known_lengths()["imdb"]) and max(lengths) == 128


def test_lengths_of_a_text_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("dog\n\nunhappy dog\n" + "dog " * 9, encoding="utf-8")
    assert workload.lengths_of(str(file), str(folder), 8) == [3, 5, 8]


def test_bad_lengths(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text(" \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"--lengths nowhere: must be one of mrpc, .*text file"):
        workload.lengths_of("nowhere", None, 512)
    with pytest.raises(ValueError, match=r"--lengths .*texts\.txt: .*--tokenizer"):
        workload.lengths_of(str(file), None, 512)
    with pytest.raises(ValueError, match=r"--lengths .*texts\.txt: the file has no text"):
        workload.lengths_of(str(file), "unused", 512)


def test_random_batches() -> None:
    batches = workload.random_batches(LENGTHS[:7], 3, 5, VOCABULARY)
    assert [batch.lengths.tolist() for batch in batches] == [[9, 4, 14], [6, 11, 5]]  # the seventh fills no batch
    assert len(workload.random_batches(LENGTHS, 3, 1, VOCABULARY)) == 1
    again = workload.random_batches(LENGTHS[:7], 3, 5, VOCABULARY)
    for batch, same in zip(batches, again, strict=True):
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert torch.equal(ids, same.inputs["input_ids"])
        assert torch.equal(mask.sum(1), batch.lengths) and mask.size(1) == batch.lengths.max()
        assert bool((mask.diff(dim=1) <= 0).all())  # padding on the right
        assert torch.equal(ids != 0, mask.bool()) and int(ids.max()) < VOCABULARY


def test_batches_need_enough_lengths() -> None:
    with pytest.raises(ValueError, match=r"--batch-size 9: there are only 8 lengths"):
        workload.random_batches(LENGTHS, 9, 1, VOCABULARY)


# What is computed


def test_compare() -> None:
    model = tiny("bert", "sequence")
    batches = workload.random_batches(LENGTHS, 4, 2, VOCABULARY)
    with torch.no_grad():
        predictions = [model(**batch.inputs).logits.argmax(-1) for batch in batches]
    batches[0].labels, batches[1].labels = predictions[0], 1 - predictions[1]
    add_skimming(model, SkimConfig(schedule=RATIOS))
    rows = {row.name: row for row in compare(model, batches, 3, Limits(slow=math.inf))}

    lengths = torch.tensor(LENGTHS)
    layers = torch.stack([(lengths * ratio).round().long().clamp(min=1) for ratio in RATIOS])
    padded = torch.tensor([14] * 4 + [20] * 4)
    shape = EncoderShape.of(model.config, model.config.hidden_size)
    assert list(rows) == [PADDED, PLAIN, KEEP_ALL, SKIMMING]
    assert rows[SKIMMING].paper_flops_speedup == shape.flops_speedup(lengths, layers)
    assert rows[PADDED].paper_flops_speedup == shape.dense_flops(lengths) / shape.dense_flops(padded)
    assert rows[PLAIN].paper_flops_speedup == rows[KEEP_ALL].paper_flops_speedup == 1.0
    baseline = min(rows[PLAIN], rows[KEEP_ALL], key=lambda row: row.median_s)
    assert baseline.wall_clock_speedup == baseline.flops_speedup == 1.0
    executed = {  # of the last layer this head reads one token, which only ours make use of
        PADDED: shape.dense_flops(padded),
        PLAIN: shape.dense_flops(lengths),
        KEEP_ALL: shape.dense_flops(lengths, first_token_only=True),
        SKIMMING: shape.as_executed().skimming_flops(lengths, layers, first_token_only=True),
    }
    assert rows[SKIMMING].tokens_kept == pytest.approx(int(layers.sum()) / (LAYERS * sum(LENGTHS)))
    assert rows[PADDED].tokens_kept == pytest.approx(int(padded.sum()) / sum(LENGTHS))
    for name in (PADDED, PLAIN, KEEP_ALL):
        assert rows[name].agreement == 1.0 and rows[name].accuracy == 0.5
    assert rows[PLAIN].tokens_kept == rows[KEEP_ALL].tokens_kept == 1.0
    for name, row in rows.items():
        assert row.flops_speedup == executed[baseline.name] / executed[name]
        assert row.skim_efficiency == row.wall_clock_speedup / row.flops_speedup
        assert row.repeats == 3 and row.median_s > 0 and row.spread is not None and row.spread >= 0
    assert model.skimming.enabled


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    calls: list[str] = []

    def run(inputs: object, name: str) -> None:
        calls.append(name)
        clock.sleep(0.02)

    field = [Contender(name, partial(run, name=name)) for name in "abc"]
    seconds = time_in_turn(field, workload.random_batches(LENGTHS, 4, 2, VOCABULARY), 2, "a")
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    assert "".join(calls) == "aabbcc" + "bbccaa"


def test_a_hopeless_contender_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    delays = {"dense": 0.01, "skimming": 0.0, "hopeless": 0.5}
    field = [Contender(name, lambda inputs, delay=delay: clock.sleep(delay)) for name, delay in delays.items()]
    seconds = time_in_turn(field, workload.random_batches(LENGTHS, 4, 2, VOCABULARY), 3, "dense")
    assert {name: len(times) for name, times in seconds.items()} == {"dense": 3, "skimming": 3, "hopeless": 1}
    assert paired_speedup(seconds["dense"], seconds["hopeless"]) < 0.2


@pytest.mark.parametrize(
    ("text", "expected"),  # the five tokens of either are read by 3, 1, 2, 1 and 2 layers
    [
        ("unhappy dog", [("unhappy", 2, True), ("dog", 1, True)]),
        ("dog unhappy", [("dog", 1, True), ("unhappy", 2, True)]),
    ],
)
def test_a_word_is_read_as_long_as_any_piece_of_it(
    tokenizer: PreTrainedTokenizerFast, text: str, expected: list[tuple[str, int]]
) -> None:
    model = add_skimming(tiny("bert", "sequence"), SkimConfig(schedule=RATIOS))
    words, predicted = show.word_depths(model, tokenizer, text)
    assert words == expected
    assert predicted == int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())


# What is written and what is refused

KEYS = ["name", "accuracy", "tokens_kept", "flops_speedup", "paper_flops_speedup", "wall_clock_speedup"]
KEYS += ["skim_efficiency", "agreement", "median_s", "spread", "repeats"]
SCHEDULED = ["--schedule", "1,0.6,0.2", "--lengths", "mrpc"]


def test_json_and_html(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, page = tmp_path / "rows.json", tmp_path / "page.html"
    options = [*SCHEDULED, "--batch-size", "4", "--batches", "2", "--repeats", "1"]
    assert main(["bench", "--model", str(folder), *options, "--json", str(data), "--html", str(page)]) == 0
    document = json.loads(data.read_text(encoding="utf-8"))
    assert [row["name"] for row in document["rows"]] == [PADDED, PLAIN, KEEP_ALL, SKIMMING]
    for row in document["rows"]:
        assert list(row) == KEYS
        assert row["accuracy"] is None  # random tokens have no labels
        assert row["spread"] is None  # timed once
    assert document["options"]["batch_size"] == 4 and document["options"]["max_length"] == 512
    assert document["environment"]["torch"] == torch.__version__
    assert document["title"] in " ".join(capsys.readouterr().out.split())

    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>")
    for row in document["rows"]:
        assert f"{row['median_s']:.3f} s" in html and all(word in html for word in row["name"].split())
    assert not re.search(r"https?:|\bsrc\s*=|\bhref\s*=|url\(|@import|<script|<link", html)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "rows.json"]


def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `make demo` runs, on four sentences."""
    data, page = tmp_path / "rows.json", tmp_path / "page.html"
    few = ["--batches", "1", "--batch-size", "4", "--repeats", "1"]
    assert main(["bench", *few, "--json", str(data), "--html", str(page)]) == 0
    rows = {row["name"]: row for row in json.loads(data.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == [PADDED, PLAIN, KEEP_ALL, SKIMMING]
    assert all(row["accuracy"] is not None for row in rows.values())
    assert rows[SKIMMING]["tokens_kept"] < 1 < rows[SKIMMING]["flops_speedup"]
    shown = capsys.readouterr().out
    assert "stored when it was trained" in shown and "4 sentences, read 2 times by each of four" in shown
    assert "stored when it was trained" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs --schedule and --lengths"),
        (["--model", "demo", *SCHEDULED], "--schedule and --lengths do not go with the demo"),
        ([*SCHEDULED, "--schedule", "1,0.6"], "--schedule 1,0.6: has 2 ratios, but the model has 3 layers"),
        ([*SCHEDULED, "--schedule", "1,0.6,2"], "--schedule 1,0.6,2: must be None or numbers from 0 to 1"),
        ([*SCHEDULED, "--lengths", "nowhere"], "--lengths nowhere"),
        ([*SCHEDULED, "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        ([*SCHEDULED, "--batch-size", "5000"], "--batch-size 5000: there are only 408 lengths"),
        ([*SCHEDULED, "--batches", "-1"], "--batches -1: must be at least 1"),
        ([*SCHEDULED, "--repeats", "0"], "--repeats 0: must be at least 1"),
        ([*SCHEDULED, "--threads", "0"], "--threads 0: must be at least 1"),
        ([*SCHEDULED, "--max-length", "3"], "--max-length 3: must be at least 4"),
        ([*SCHEDULED, "--max-length", "32", "--lengths", "33"], "--lengths 33: a number must be from 1 to 32 here"),
        (["--model", "demo", "--max-length", "16"], "--max-length 16: does not go with the demo model"),
        (["--model", "demo", "--tokenizer", "bert"], "--tokenizer bert: does not go with the demo model"),
        (["--model", "./nowhere/at-all"], "--model ./nowhere/at-all: no such folder"),
        ([*SCHEDULED, "--kernels", "fast"], "--kernels fast: must be one of"),
    ],
)
def test_refused_arguments(folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", str(folder), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # loading has shown its progress before
    assert error.startswith("transkimmer bench: ") and message in error


@pytest.mark.parametrize("model", ["demo", "folder"])
def test_the_kernels_that_are_named_are_those_that_are_timed(
    folder: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []

    def compared(model: PreTrainedModel, batches: list[workload.Batch], repeats: int) -> list[Row]:
        timed.append(model.skimming.kernels)
        return compare(model, batches, repeats)

    monkeypatch.setattr(command, "compare", compared)
    options = ["--kernels", "reference", "--batches", "1", "--batch-size", "2", "--repeats", "1"]
    options += ["--model", str(folder), *SCHEDULED] if model == "folder" else []
    assert main(["bench", *options]) == 0
    assert timed == ["reference"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["demo", "folder"])
def test_what_is_compared_is_as_the_options_say(
    folder: Path, model: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In evaluation mode; the folder's model has 80 positions, and one of the first 64 texts of IMDB is longer."""
    seen: list[tuple[object, ...]] = []

    def compared(model: PreTrainedModel, batches: list[workload.Batch], repeats: int) -> list[Row]:
        longest = max(int(batch.lengths.max()) for batch in batches)
        seen.append(({p.dtype for p in model.parameters()}, len(batches), repeats, model.training, longest))
        raise ValueError("seen enough")

    monkeypatch.setattr(command, "compare", compared)
    options = ["--batches", "2", "--batch-size", "32", "--repeats", "7", "--dtype", dtype]
    if model == "folder":
        options += ["--model", str(folder), "--schedule", "1,0.6,0.2", "--lengths", "imdb"]
    assert main(["bench", *options]) == 2
    (((*found, longest)),) = seen
    assert found == [{workload.DTYPES[dtype]}, 2, 7, False]
    assert model == "demo" or longest == 80


def test_unknown_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--dtype", "fp64"])
    assert "--dtype" in capsys.readouterr().err
