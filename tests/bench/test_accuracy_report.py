"""accuracy.csv into tables and plots: means over seeds, what changes them, and rows that are refused."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from benchmarks import paper_tables, report
from benchmarks.accuracy import plots as accuracy_plots
from benchmarks.accuracy import results as accuracy_results
from benchmarks.accuracy import tables as accuracy_tables

COLUMNS = (
    *("date", "commit", "device", "task", "backbone", "mode", "seed", "skim_weight", "pruned", "bf16", "decision"),
    *("calibrated_to", "metric", "dense", "value", "held_out_value", "flops_speedup", "flops_speedup_padded"),
    *("wall_clock_speedup", "skim_efficiency", "tokens_kept", "seconds_train"),
    *("forward_value", "forward_agreement", "forward_difference"),
)


def row(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = dict(date="2026-01-01", commit="aaa", device="cpu-x", task="rte", backbone="MiniLM")
    found |= dict(
        mode="corrected", seed=1, skim_weight=1.0, pruned=False, bf16=False, decision="threshold", calibrated_to=2.0
    )
    found |= dict(metric="accuracy", dense=0.62, value=0.60, held_out_value=0.58, flops_speedup=2.02)
    found |= dict(flops_speedup_padded=8.5, tokens_kept="[1.0, 0.5, 0.1]", seconds_train=12.5)
    return found | changes


ROWS = [
    row(),
    row(seed=2, dense=0.64, value=0.64, flops_speedup=2.06, wall_clock_speedup=1.9, skim_efficiency=0.95),
    row(seed=2, date="2025-01-01", value=0.1),  # superseded
    row(decision="argmax", calibrated_to="", value=0.61, flops_speedup=1.5, tokens_kept="[1.0, 0.9, 0.4]")
    | dict(forward_value=0.63, forward_agreement=0.985, forward_difference=2.5e-7),
    row(mode="published", decision="sample", calibrated_to="", value=0.53, flops_speedup=1.2, skim_weight=0.8),
    row(mode="dense", skim_weight="", pruned="", decision="", calibrated_to="", value=0.62, flops_speedup=1.0)
    | dict(flops_speedup_padded="", tokens_kept=""),
    row(task="mrpc", metric="f1", value=0.8, dense=0.82, flops_speedup=2.5, tokens_kept="[0.8, 0.4, 0.2]"),
]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> list[accuracy_results.Row]:
    return accuracy_results.read(written(tmp_path / "accuracy.csv", ROWS))


def test_means_are_over_seeds_and_the_newest_row_of_a_seed(rows: list[accuracy_results.Row]) -> None:
    panels = accuracy_results.panels(accuracy_results.configurations(rows))
    assert list(panels) == [("mrpc", "MiniLM", "f1"), ("rte", "MiniLM", "accuracy")]
    group = panels["rte", "MiniLM", "accuracy"]
    assert [one.mode for one in group] == ["dense", "corrected", "corrected", "published"]
    calibrated = next(one for one in group if one.calibrated_to == 2.0)
    value = calibrated.mean("value")
    assert value is not None and value.seeds == 2
    assert (value.value, value.spread) == pytest.approx((0.62, 0.0282843), rel=1e-5)
    assert accuracy_results.dense(group) == accuracy_results.Mean(0.63, pytest.approx(0.0141421, rel=1e-5), 2)
    assert calibrated.mean("wall_clock_speedup") == accuracy_results.Mean(1.9, None, 1)
    assert calibrated.tokens_kept == [1.0, 0.5, 0.1]


def test_trials_stand_below_the_tables(tmp_path: Path, rows: list[accuracy_results.Row]) -> None:
    columns = "task,metric,seed,settings,decision,calibrated_to,dense,value,flops_speedup,tokens_kept"
    cells = 'stsb,pearson,1,"{""aim"": true}",threshold,2.0,0.88,0.861,2.013,"[1.0, 0.25]"'
    (tmp_path / "trials.csv").write_text(f"{columns}\n{cells}\n", encoding="utf-8")
    trials = accuracy_results.read_trials(tmp_path / "trials.csv")
    for some in (rows, []):
        page = accuracy_tables.page(some, trials)
        assert page.endswith("| 1 | stsb (pearson) | calibrated to 2.0 | 86.10 | -1.90 | 2.01 | 100% 25% |\n")
        assert "\n1. stsb, seed 1: aim True\n" in page
    assert "Trials" not in accuracy_tables.page(rows) and accuracy_results.read_trials(tmp_path / "none.csv") == []


def test_the_page(rows: list[accuracy_results.Row]) -> None:
    page = accuracy_tables.page(rows)
    cells = (
        "| corrected | 1 | calibrated to 2 | 62.00 ± 2.83 | -1.00 ± 1.41 | 58.00 ± 0.00 | 2.04 ± 0.03 | 8.50 ± 0.00 |"
    )
    assert f"{cells} 53.3% | 1.90 | **0.95** | 2 |" in page
    assert "| published | 0.8 | sample | 53.00 | -9.00 | 58.00 | 1.20 | 8.50 | 53.3% | – | – | 1 |" in page
    assert "| corrected | 1 | 61.00 | 63.00 | 98.50 | 2.5e-07 | 1 |" in page and page.count("training forward |") == 1
    assert "## mrpc, MiniLM: f1" in page and "](plots/accuracy-trade-off.svg)" in page
    assert "On cpu-x; commit aaa." in page


def test_nothing_measured(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("", encoding="utf-8")
    for path in (tmp_path / "none.csv", tmp_path / "empty.csv", written(tmp_path / "head.csv", [])):
        assert accuracy_results.read(path) == []
    assert accuracy_tables.UNMEASURED in accuracy_tables.page([])
    assert accuracy_plots.figures([]) == []
    glue = paper_tables.blocks([])["glue"]
    assert "| RTE | 65.7 | 68.9 | 2.85 | 4.67 | not run | – | – | – | – | – |" in glue


def test_plots_change_with_the_data(rows: list[accuracy_results.Row], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib, a development dependency")
    figures = accuracy_plots.figures(rows)
    assert [(figure.name, figure.panels) for figure in figures] == [("trade-off", 2), ("layers", 2)]
    texts = []
    for figure in figures:
        figure.draw(tmp_path)
        texts.append((tmp_path / figure.path).read_text(encoding="utf-8"))
        figure.draw(tmp_path)
        assert texts[-1] == (tmp_path / figure.path).read_text(encoding="utf-8") and figure.is_current(tmp_path)
    for text in ("rte, MiniLM", "mrpc, MiniLM", "dense fine-tune", "published, sample", "corrected, argmax"):
        assert text in texts[0]
    assert "rte: ×2.04, calibrated to 2" in texts[1] and "mrpc: ×2.50, calibrated to 2" in texts[1]
    rows[0]["value"] = 0.5
    changed = accuracy_plots.figures(rows)
    assert [figure.is_current(tmp_path) for figure in changed] == [False, True]
    changed[0].draw(tmp_path)
    assert (tmp_path / figures[0].path).read_text(encoding="utf-8") != texts[0]


@pytest.mark.parametrize(
    ("column", "value", "allowed"),
    [
        ("value", "62.5", "a number from -1 to 1"),
        ("value", "", "a number from -1 to 1"),
        ("flops_speedup", "nan", "a number > 0"),
        ("seed", "one", "an integer"),
        ("tokens_kept", "[1.0, 1.5]", "a JSON list of shares from 0 to 1"),
        ("tokens_kept", "0.5", "a JSON list of shares from 0 to 1"),
        ("pruned", "maybe", "True or False"),
        ("task", "", "some text"),
    ],
)
def test_a_row_that_makes_no_sense(tmp_path: Path, column: str, value: str, allowed: str) -> None:
    path = written(tmp_path / "accuracy.csv", [row(), row(**{column: value})])
    with pytest.raises(ValueError) as error:
        accuracy_results.read(path)
    assert str(error.value) == f"{path}, line 3: {column}={value!r}: must be {allowed}"


def test_devices_are_told_apart_but_not_processors(tmp_path: Path) -> None:
    gpu = dict(device="nvidia-h200", value=0.5, dense="")
    found = [row(), row(seed=2, device="cpu-y"), row(**gpu), row(mode="dense", **gpu)]
    found = accuracy_results.read(written(tmp_path / "accuracy.csv", found))
    cpu, training, dense = sorted(accuracy_results.configurations(found), key=lambda one: (one.mode, one.place))[:3]
    assert (cpu.training, len(cpu.rows)) == ("corrected", 2)
    assert (training.training, len(training.rows)) == ("corrected, nvidia-h200", 1)
    assert (dense.training, len(dense.rows)) == ("dense, nvidia-h200", 1)
    everything = accuracy_results.dense([cpu, training, dense])
    assert everything is not None and everything.seeds == 3


def test_the_summary_is_of_the_corrected_recipe_at_twice_the_speed(rows: list[accuracy_results.Row]) -> None:
    *_, mrpc, rte = accuracy_tables.summary(rows).strip().splitlines()
    figures = "63.00 ± 1.41 | 62.00 ± 2.83 | -1.00 ± 1.41 | 1.90 | **0.95** | 2"
    assert rte == f"| MiniLM | rte (accuracy) | corrected | {figures} |"
    assert mrpc.startswith("| MiniLM | mrpc (f1) | corrected | 82.00 | 80.00 | -2.00 | – | – | 1 |")
    assert accuracy_tables.summary([]).count("\n") == 2


def test_other_columns_and_cut_off_rows(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.csv"
    path.write_text("task,seed\nrte,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no column date, backbone"):
        accuracy_results.read(path)
    text = written(path, [row()]).read_text(encoding="utf-8")
    path.write_text(text[: text.rindex(",")], encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: has fewer values"):
        accuracy_results.read(path)


def test_a_report_on_malformed_rows_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "accuracy.csv", [row(seed="x")])
    read = accuracy_results.read
    monkeypatch.setattr(accuracy_results, "read", lambda _: read(tmp_path / "accuracy.csv"))
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    assert report.main() == 2
    assert "accuracy.csv, line 2: seed='x': must be an integer" in capsys.readouterr().err
