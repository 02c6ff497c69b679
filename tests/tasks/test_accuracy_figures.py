"""Which figure of a trained model stands in which column of the table; what a backbone's size asks for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import BertConfig
from transkimmer import SkimConfig, add_skimming
from transkimmer.tasks import TEXT_TASKS

from benchmarks.accuracy import stored
from benchmarks.accuracy import table as table_module
from benchmarks.accuracy.table import POINTS, Table
from benchmarks.accuracy.training import size_settings

from ..bench.test_accuracy_points import POINT, of, table, training
from ..models.tiny import tiny

__all__ = ["table"]  # a fixture


def test_a_points_figures_are_of_development_rows(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is calibrated on held-out rows, of which the metric alone is told: FLOPs and tokens are not theirs."""

    def figures(number: int) -> dict[str, Any]:
        return {"metrics": {"accuracy": number / 10}, "flops_speedup": 1 + number, "tokens_kept_by_layer": [number / 9]}

    held, dev = (SimpleNamespace(batches=[name], features=name) for name in ("held", "dev"))
    model = add_skimming(tiny("bert", "sequence"), SkimConfig(decision="sample"))
    document = {"held_out": {"threshold": figures(1), "sample": figures(2)}}
    document["dev"] = {"threshold": figures(3), "sample": figures(4)}

    def judged(model: Any, rows: Any) -> Any:
        assert model.skimming.config.decision == "threshold"
        return SimpleNamespace(to_dict=lambda: figures(5 if rows is held else 6))

    def calibrated(model: Any, batches: Any, speedups: Any, name: str) -> Any:
        assert (batches, speedups) == (["held"], [2.0])
        yield 2.0, -0.25

    forward = SimpleNamespace(metrics={"accuracy": 0.7}, agreement=0.99, max_difference=0.5, max_logit=4.0)
    monkeypatch.setattr(table, "_loaded", lambda job, *splits: (model, held, dev))
    monkeypatch.setattr(table_module, "_padding", lambda model, batches, length: 10.0 if batches == ["dev"] else 0.0)
    monkeypatch.setattr(table_module, "training_forward_difference", lambda model, batches, judge: forward)
    monkeypatch.setattr(table_module, "calibrated", calibrated)
    job = SimpleNamespace(task=TEXT_TASKS["rte"], kind=SimpleNamespace(judge=lambda *a: None), judged=judged)
    points = table._points(training(), job, document)
    columns = ("decision", "value", "held_out_value", "flops_speedup", "flops_speedup_padded", "tokens_kept", "shift")
    assert [tuple(point[column] for column in columns) for point in points] == [
        ("argmax", 0.3, 0.1, 4, 40.0, [3 / 9], 0.0),
        ("sample", 0.4, 0.2, 5, 50.0, [4 / 9], 0.0),
        ("threshold", 0.6, 0.5, 7, 70.0, [6 / 9], -0.25),
    ]
    apart = [{name: value for name, value in point.items() if name.startswith("forward")} for point in points]
    assert apart == [{"forward_value": 0.7, "forward_agreement": 0.99, "forward_difference": 0.125}, {}, {}]
    assert [point.get("calibrated_to") for point in points] == [None, None, 2.0]


def test_a_point_is_timed_where_it_was_calibrated_to(
    table: Table, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A shift of the logits by 0.5 is a threshold of -0.5 on them; what has a time is not timed again."""
    run = training()
    points = [{**POINT, "shift": shift, "calibrated_to": wanted} for wanted, shift in ((1.5, 0.5), (2.0, -1.0))]
    points.append({**POINT, "calibrated_to": 3.0, "wall_clock_speedup": 2.5, "skim_efficiency": 0.7})
    stored.add(table.results, [of(run, **point) for point in points])
    (tmp_path / run.folder).mkdir(parents=True)
    (tmp_path / run.folder / POINTS).write_text(json.dumps(points), encoding="utf-8")
    model = add_skimming(tiny("bert", "sequence"), SkimConfig(decision="sample"))
    timed: list[tuple[str, float]] = []

    def figures_of(model: Any, *rest: Any) -> dict[str, float]:
        timed.append((model.skimming.config.decision, round(model.skimming.config.logit_threshold, 9)))
        return {"wall_clock_speedup": len(timed) + 0.5, "skim_efficiency": 0.9}

    monkeypatch.setattr(table, "_loaded", lambda *arguments: (model, SimpleNamespace(batches=[], features=[])))
    monkeypatch.setattr(table_module, "kind_of", lambda task: SimpleNamespace(judge=lambda *arguments: None))
    monkeypatch.setattr(table_module, "figures_of", figures_of)
    table.add_times(run, 1)
    assert timed == [("threshold", -0.5), ("threshold", 1.0)]
    assert [row["wall_clock_speedup"] for row in stored.read(table.results)] == ["1.5", "2.5", "2.5"]


@pytest.mark.parametrize(("width", "small"), [(384, True), (512, True), (768, False)])
def test_small_backbones_are_trained_longer(width: int, small: bool, tmp_path: Path) -> None:
    BertConfig(hidden_size=width, num_attention_heads=4).save_pretrained(tmp_path)
    found = {mode: size_settings(str(tmp_path), mode, "rte") for mode in ("dense", "paper", "corrected")}
    if not small:
        assert found == {"dense": {}, "paper": {}, "corrected": {}}
        return
    assert found["dense"] == {"dense_learning_rate": 1e-4, "dense_epochs": 5.0}
    assert found["paper"] == {"learning_rate": 1e-4, "epochs": 13.0}
    own = {"learning_rate": 1e-4, "predictor_learning_rate": 1e-3, "epochs": 8.0}
    assert found["corrected"] == found["dense"] | own | {"predictor_width": width // 4, "pruned_training": True}
    assert size_settings(str(tmp_path), "corrected", "sst2")["epochs"] == 3.0
