"""benchmarks.accuracy: which points a curve has, which dense model they are compared with, and rows timed later."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedModel
from transkimmer import SkimConfig, add_skimming
from transkimmer.tasks import TEXT_TASKS
from transkimmer.training import evaluate
from transkimmer.training.calibration import calibrate
from transkimmer.training.recipe import MODEL

from benchmarks.accuracy import stored
from benchmarks.accuracy import table as table_module
from benchmarks.accuracy.curve import calibrated
from benchmarks.accuracy.table import POINTS, Table
from benchmarks.accuracy.training import Training

from ..models.tiny import padded_inputs, tiny, undecided_predictors

POINT = {"decision": "threshold", "calibrated_to": 2.0, "value": 0.61, "flops_speedup": 2.0, "shift": 0.5}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    monkeypatch.setattr("benchmarks.accuracy.training.size_settings", lambda backbone, mode, task: {})
    options = {"data": tmp_path, "results": tmp_path / "accuracy.csv", "work": tmp_path, "speedups": [2.0]}
    return Table(argparse.Namespace(**options, keep=True))


def training(mode: str = "corrected", bf16: bool = False) -> Training:
    return Training("rte", mode, 1, "backbone", "tiny", bf16=bf16)


def of(training: Training, **values: Any) -> dict[str, Any]:
    """A row with what a run of another day and machine says of itself."""
    origin = {"date": "2026-01-01", "commit": "aaa", "device": "cpu-other", "metric": "accuracy"}
    return {**training.columns, **origin, **values}


# Which points


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Skims a lot, however far its logits are shifted towards keeping."""
    model = add_skimming(tiny("bert", "sequence"), SkimConfig())
    undecided_predictors(model)
    for predictor in model.skimming.predictors:
        predictor.out.weight.data *= 4
        predictor.shift(-4.0)
    return model.eval()


def test_a_curve_goes_on_after_speedups_that_are_too_low(
    model: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = [padded_inputs((40, 31, 25, 38))]
    before = [predictor.out.bias.detach().clone() for predictor in model.skimming.predictors]
    found = []
    for wanted, shift in calibrated(model, batches, [1.0, 1.1, 2.0, 2.5, 98.0, 99.0], "name"):
        found.append((wanted, shift))
        assert evaluate(model, batches).flops_speedup >= wanted
    assert [wanted for wanted, _ in found] == [2.0, 2.5]
    assert found[0][1] > found[1][1]
    moved = float(model.skimming.predictors[0].out.bias.detach().diff() - before[0].diff())
    assert abs(moved) == pytest.approx(abs(found[1][1]), abs=1e-5), "the shift is the sum of all that were made"
    first, second, last = capsys.readouterr().err.splitlines()
    assert first.startswith("name: flops_speedup=1.0: skims to") and "at least" in first
    assert second.startswith("name: flops_speedup=1.1: skims to") and "at least" in second
    assert last.startswith("name: flops_speedup=98.0: skims to") and "at most" in last, "and 99 is not tried"


def test_what_else_is_refused_ends_no_curve_silently(model: PreTrainedModel) -> None:
    batches = [padded_inputs((9, 14))]
    with pytest.raises(ValueError, match=r"flops_speedup=0.5: must be a finite number >= 1"):
        list(calibrated(model, batches, [0.5, 2.0], "name"))
    with pytest.raises(ValueError, match=r"flops_speedup=0.5: must be a finite number >= 1"):
        calibrate(model, batches, 0.5)


# Compared with which dense model


@pytest.mark.parametrize(("document", "dense"), [({"dense_dev": {"metrics": {"accuracy": 0.7}}}, "0.7"), ({}, "0.6")])
def test_rows_say_what_the_dense_model_gave_that_they_started_from(
    table: Table, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, document: dict[str, Any], dense: str
) -> None:
    """Which may be another one than that of the row, trained again for the sake of its weights."""
    dense_run, run = training("dense"), training()
    stored.add(table.results, [of(dense_run, value=0.6, dense=0.6)])
    (tmp_path / dense_run.folder / MODEL).mkdir(parents=True)
    output = tmp_path / run.folder
    output.mkdir(parents=True)
    job = SimpleNamespace(output=output, task=TEXT_TASKS["rte"])
    monkeypatch.setattr(table, "_carry_out", lambda training, dense: (job, document, 5.0))
    monkeypatch.setattr(table, "_points", lambda *arguments: [POINT])
    table.finish(run)
    row = stored.read(table.results)[1]
    assert (row["mode"], row["dense"], row["value"], row["seconds_train"]) == ("corrected", dense, "0.61", "5")


# Timed later


def test_timing_changes_nothing_else_of_a_row(table: Table, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained, timed = training(bf16=True), training(bf16=False)
    points = [POINT, {**POINT, "decision": "sample", "calibrated_to": None}]
    stored.add(table.results, [of(trained, **point, seconds_train=7.0) for point in points])
    stored.add(table.results, [of(training("published"), **POINT)])
    before = stored.read(table.results)
    folder = tmp_path / timed.folder
    folder.mkdir(parents=True)
    elsewhere = {**POINT, "calibrated_to": 3.0}  # of no row
    (folder / POINTS).write_text(json.dumps([*points, elsewhere]), encoding="utf-8")
    model = add_skimming(tiny("bert", "sequence"), SkimConfig())
    monkeypatch.setattr(table, "_loaded", lambda *arguments: (model, SimpleNamespace(batches=[], features=[])))
    monkeypatch.setattr(table_module, "kind_of", lambda task: SimpleNamespace(judge=lambda *arguments: None))
    figures = {"wall_clock_speedup": 1.75, "skim_efficiency": 0.9, "metrics": {}}
    monkeypatch.setattr(table_module, "figures_of", lambda *arguments: figures)
    table.add_times(timed, 1)
    expected = [before[0] | {"wall_clock_speedup": "1.75", "skim_efficiency": "0.9"}, *before[1:]]
    assert stored.read(table.results) == expected
    assert before[0]["bf16"] == "True" and before[0]["commit"] == "aaa"


def test_a_training_without_rows_is_not_timed(table: Table, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / training().folder
    folder.mkdir(parents=True)
    (folder / POINTS).write_text(json.dumps([POINT]), encoding="utf-8")
    monkeypatch.setattr(table, "_loaded", lambda *arguments: pytest.fail("loaded"))
    table.add_times(training(), 1)
    assert stored.read(table.results) == []
