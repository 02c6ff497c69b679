"""make report: tables and plots of dated runs, and that stale ones are noticed."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import model_tables, plots, report, runs

OURS, PADDED, PLAIN = model_tables.OURS, model_tables.PADDED, "dense, padding-free (plain PyTorch)"
ENVIRONMENT = {"processor": "A Processor", "threads": 2, "torch": "2.13.0"}


def workload(**changes: Any) -> dict[str, Any]:
    found = {"model": "bert-base-shape", "lengths": "mrpc", "schedule": "mrpc", "decisions": "synthetic"}
    return found | {"batch_size": 8, "batches": 4, "dtype": "fp32", "device": "cpu", "threads": 2} | changes


def model_row(contender: str, seconds: float, **changes: Any) -> dict[str, Any]:
    """A row on `workload(**changes)`; skimming is twice as fast as ours, which does 3 times the FLOPs."""
    row = {"kind": "model", "workload": workload(**changes), "contender": contender, "note": None, "repeats": 5}
    row |= {"median_s": seconds, "spread": 0.03, "tokens_per_s": 1234.5 / seconds, "peak_memory": 2**24}
    row |= {"flops": 4e9, "bytes": 1e8, "ceilings": {"bytes_per_s": 1e10, "flops_per_s": 1e11}}
    row |= {"executed_flops_speedup": 3.0, "wall_clock_speedup": 2.0, "skim_efficiency": 2 / 3}
    row |= {"speedups": {OURS: 2.0, PLAIN: 4.5, PADDED: 6.25}, "roofline_share": 0.5, "max_difference": 3e-6}
    return row


def documents() -> list[dict[str, Any]]:
    rows = [
        model_row(name, seconds * size, batch_size=size)
        for size in (1, 8)
        for name, seconds in (("skimming", 1.0), (OURS, 2.0), (PADDED, 6.25), (PLAIN, 4.5))
    ]
    rows[2]["repeats"] = 1
    rows[0]["spread"] = None
    absent = {"kind": "model", "workload": workload(), "contender": "absent", "note": "not installed"}
    layer = {"layer": 0, "tokens": 60, "decision_s": 0.1, "layer_s": 0.5}
    profile = {"kind": "profile", "workload": workload(), "contender": "skimming", "layers": [layer, layer]}
    training = [
        {"kind": "training", "workload": workload(), "contender": name, "median_s": seconds, "spread": 0.1}
        | {"speedups": {"packed": 0.5} if name == "masked" else {"masked": 2.0}, "peak_memory": None, "repeats": 5}
        for name, seconds in (("masked", 8.0), ("packed", 4.0))
    ]
    new = {"date": "2026-02-02T00:00:00", "commit": "bbb", "environment": ENVIRONMENT}
    old = {"date": "2026-01-01T00:00:00", "commit": "aaa", "environment": ENVIRONMENT}
    stale = copy.deepcopy(rows[0]) | {"skim_efficiency": 0.11, "median_s": 99.0}
    fewer = copy.deepcopy(stale) | {"workload": workload(batch_size=1, batches=2)}
    return [new | {"rows": [*rows, absent, profile, *training]}, old | {"rows": [stale, fewer]}]


@pytest.fixture
def device(tmp_path: Path) -> runs.Device:
    for document in documents():
        path = tmp_path / "cpu-x" / f"{document['date'][:10]}-{document['commit']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document), encoding="utf-8")
    (tmp_path / "cpu-x" / "mrpc-fp32.json").write_text("{}", encoding="utf-8")  # a single run, rendered elsewhere
    (tmp_path / "empty").mkdir()
    (device,) = runs.load(tmp_path)
    return device


def test_the_newest_row_of_a_workload_counts(device: runs.Device) -> None:
    assert device.name == "cpu-x" and list(device.environments) == ["aaa", "bbb"]
    groups = device.groups("model")
    assert [group[0]["batch_size"] for group in groups] == [1, 8]
    assert groups[0][1]["skimming"]["median_s"] == 1.0 and len(groups[1][1]) == 5


def test_a_note_replaces_no_figures(device: runs.Device) -> None:
    """A later run without a contender, whatever number of batches it had; figures replace a note, and one another."""
    measured = documents()

    def later(date: str, *rows: dict[str, Any]) -> dict[str, Any]:
        return {"date": date, "commit": date, "environment": ENVIRONMENT, "rows": list(rows)}

    absent = {"kind": "model", "contender": PADDED, "note": "left out: --without sdpa"}
    notes = [absent | {"workload": workload()}, absent | {"workload": workload(), "contender": "absent"}]
    notes.append(absent | {"workload": workload(batches=2)})
    step = next(row for row in measured[0]["rows"] if row["contender"] == "packed") | {"note": "without graphs: slow"}
    merged = runs.merge("cpu-x", [later("2026-03-03", *notes, step | {"median_s": 3.0}), *measured])
    rows = {row["contender"]: row for row in merged.groups("model")[1][1].values()}
    assert rows[PADDED]["median_s"] == 50.0 and rows["absent"]["note"].startswith("left out")
    assert len(merged.groups("model")) == 2, "none is of the number of batches that no figures are of"
    assert merged.groups("training")[0][1]["packed"]["median_s"] == 3.0, "figures that have a note as well"
    figures = model_row("absent", 7.0)
    again = runs.merge("cpu-x", [later("2026-04-04", figures), later("2026-03-03", *notes), *measured])
    assert again.groups("model")[1][1]["absent"] == figures


def test_the_page(device: runs.Device) -> None:
    page = model_tables.page([device])
    cells = "| bert-base-shape | mrpc | synthetic, mrpc | fp32 | 8 | 3.00 | 2.00 | **0.67** | 3% |"
    assert f"{cells} 4.50 (plain PyTorch) | 6.25 | 50% | 0.67 | 3e-06 |" in page
    assert "0.11" not in page and page.endswith("(plots/cpu-x-layers.svg)\n")
    assert "| model | lengths | dtype | batch | skimming | ours | Hugging Face SDPA | plain PyTorch |" in page
    assert "| bert-base-shape | mrpc | fp32 | 1 | 1,234 | 617 | 198* | 274 |" in page
    assert "| bert-base-shape | mrpc | fp32 | 8 | 16 | 16 | 16 | 16 |" in page
    assert "| 1 | 3.00 | 2.00 | **0.67** | – |" in page
    assert "- absent: not installed" in page and "commit aaa, bbb" in page
    assert "\nA Processor with cpu-x, 2 threads, torch 2.13.0; `transkimmer bench model`" in page
    assert "| bert-base-shape | mrpc | fp32 | 8 | packed | 1000 ms | 10% | 2.00 | – |" in page


def test_the_headline_is_the_largest_batch(device: runs.Device) -> None:
    headline = model_tables.headline([device])
    cells = "| bert-base-shape | mrpc | fp32 | 8 | 3.00 | 2.00 | **0.67** | 3% | 4.50 (plain PyTorch) | 6.25 |"
    assert headline.count("| bert-base-shape |") == 1 and f"\n{cells}\n" in headline
    assert headline.startswith("**A Processor with cpu-x, 2 threads, torch 2.13.0**\n") and "commit a" not in headline
    names = "| model | lengths | dtype | batch | FLOPs × | wall-clock × | **skim efficiency** | spread |"
    assert f"{names} × fastest of the others | × padded HF |\n" in headline
    assert "](docs/plots/cpu-x-speedup.svg)" in headline
    assert model_tables.headline([]) == ""


def test_plots_are_the_same_bytes_and_know_their_data(device: runs.Device, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots are drawn by matplotlib, a development dependency")
    figures = plots.figures([device])
    assert [figure.name for figure in figures] == ["speedup", "latency", "roofline", "layers"]
    for figure in figures:
        assert not figure.is_current(tmp_path)
        figure.draw(tmp_path)
        drawn = (tmp_path / figure.path).read_bytes()
        figure.draw(tmp_path)
        assert drawn == (tmp_path / figure.path).read_bytes() and figure.is_current(tmp_path)
        assert drawn.lstrip().startswith(b"<?xml") and len(drawn) < 100_000
    device.groups("model")[1][1]["skimming"]["wall_clock_speedup"] = 1.9
    assert [figure.is_current(tmp_path) for figure in plots.figures([device])] == [False, True, True, True]


class Axes:
    """Remembers what is drawn where; a plot's hash is that of its data, whatever is drawn of them."""

    def __init__(self) -> None:
        self.points: list[tuple[list[float], list[float], str]] = []
        self.labels: dict[str, str] = {}

    def scatter(self, x: Iterable[float], y: Iterable[float], *, label: str, **rest: object) -> None:
        self.points.append((list(x), list(y), label))

    def set(self, **labels: str) -> None:
        self.labels = labels

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **rest: None


def test_speedups_are_drawn_on_their_axes() -> None:
    axes: Any = Axes()
    plots.paint_speedups(axes, [{"flops": 3.0, "time": 2.5, "dtype": "bf16", "batch_size": 8}])
    assert axes.points == [([3.0], [2.5], "bf16, batch 8")]
    assert (axes.labels["xlabel"], axes.labels["ylabel"]) == ("FLOPs speedup", "wall-clock speedup")


def test_rates_are_drawn_on_their_axes() -> None:
    axes: Any = Axes()
    ceilings = {"bytes_per_s": 1e10, "flops_per_s": 1e11}
    plots.paint_rooflines(axes, {"dtype": "fp32", "lines": {"skimming": [[5.0, 4e10]]}, "ceilings": ceilings})
    assert axes.points == [([5.0], [4e10], "skimming")]
    assert (axes.labels["xlabel"], axes.labels["ylabel"]) == ("FLOPs per byte that must move", "FLOP/s")


def test_what_is_missing_is_not_drawn(device: runs.Device) -> None:
    device.rows = [row for row in device.rows if row["kind"] == "training"]
    assert plots.figures([device]) == []
    device.rows = [model_row("skimming", 1.0)]  # a single batch size is no line
    assert [figure.name for figure in plots.figures([device])] == ["speedup", "roofline"]


def test_stale_pages_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(report.README.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "docs").mkdir()
    shutil.copy(report.ROOT / "docs/paper.md", tmp_path / "docs")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "demo_lines", list)  # reads a file of the package
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    assert report.main() == 1 and "README.md: is not what the stored results say" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["report"])
    assert report.main() == 0
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    assert report.main() == 0
    readme.write_text(readme.read_text(encoding="utf-8").replace("2.96", "3.96", 1), encoding="utf-8")
    assert report.main() == 1
