"""transkimmer profile: what it reads out of the profiler's events, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transkimmer.bench import peers, profiling
from transkimmer.cli import main

from ..models.tiny import LAYERS, tiny
from .tiny_workload import SETTING, batches


def event(name: str, start: float, elapsed: float, parent: object = None, device: float = 0.0) -> SimpleNamespace:
    times = SimpleNamespace(start=start, end=start + elapsed, elapsed_us=lambda: elapsed)
    return SimpleNamespace(name=name, time_range=times, cpu_parent=parent, device_time_total=device)


def test_calls_before_a_layer_decide_on_it() -> None:
    layer = event("transkimmer::encoder_layer_", 10, 100, device=7)
    events = [
        event("transkimmer::skim_tokens", 120, 30),
        event("transkimmer::encoder_layer_", 160, 50, device=3),
        event("aten::linear", 11, 20, parent=layer),
        event("transkimmer::ragged_linear", 31, 20, parent=event("aten::thing", 30, 30, parent=layer)),
        event("transkimmer::compact", 1, 5),
        layer,
        event("transkimmer::encoder_layer_", 300, 60),  # the next pass
        event("transkimmer::encoder_layer_", 400, 40),
    ]
    found = profiling.layer_times(events, [8, 3], passes=2, on_device=False)
    assert [(layer.layer, layer.tokens) for layer in found] == [(0, 8), (1, 3)]
    assert [layer.decision_s for layer in found] == pytest.approx([2.5e-6, 15e-6])
    assert [layer.layer_s for layer in found] == pytest.approx([80e-6, 45e-6])
    on_device = profiling.layer_times(events, [8, 3], passes=1, on_device=True)
    assert [layer.layer_s for layer in on_device] == pytest.approx([7e-6, 3e-6])
    assert profiling.layer_times(events[4:5], [8, 3], passes=1, on_device=False) == []
    assert profiling.layer_times(events, [], passes=1, on_device=False) == []


@pytest.mark.parametrize(
    ("intervals", "share"),
    [([], None), ([(3, 5)], 0.0), ([(6, 10), (0, 4)], 0.2), ([(0, 8), (1, 2), (9, 10)], 0.1), ([(0, 4), (2, 8)], 0.0)],
)
def test_share_of_gaps(intervals: list[tuple[float, float]], share: float | None) -> None:
    assert profiling.gap_share(intervals) == (None if share is None else pytest.approx(share))


def test_operators_are_per_pass() -> None:
    average = SimpleNamespace(key="a", count=6, self_cpu_time_total=3e6, self_device_time_total=9e6)
    assert profiling.operator_times([average], 3) == [profiling.OperatorTime("a", 2.0, 1.0, 3.0)]


@torch.no_grad()
def test_tokens_are_those_of_all_batches(subject: peers.Subject) -> None:
    peer = next(peer for peer in peers.PEERS if peer.key == "skimming")
    row = profiling.measure(SETTING, subject, batches(), peer, 1)
    if not row["layers"]:
        pytest.skip("these kernels have no operator for a whole layer")
    assert [layer["tokens"] for layer in row["layers"]] == [33, 5 + 2 + 8 + 4, 2 + 1 + 3 + 1]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("model")
    tiny("bert", "sequence").save_pretrained(folder)
    workload = ["--lengths", "sst2", "--schedule", "1,0.6,0.2", "--batch-size", "4", "--batches", "2"]
    return ["profile", "--model", str(folder), *workload, "--repeats", "2"]


def test_the_command(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, trace = tmp_path / "rows.json", tmp_path / "trace.json"
    assert main([*options, "--json", str(data), "--trace", str(trace)]) == 0
    (row,) = json.loads(data.read_text(encoding="utf-8"))["rows"]
    assert (row["kind"], row["contender"], row["repeats"], row["gap_share"]) == ("profile", "skimming", 2, None)
    assert len(row["layers"]) == LAYERS
    tokens = [layer["tokens"] for layer in row["layers"]]
    assert tokens[0] > tokens[1] > tokens[2] > 0
    assert all(layer["layer_s"] > 0 and layer["decision_s"] > 0 for layer in row["layers"])
    layer = next(o for o in row["operators"] if o["name"] == "transkimmer::encoder_layer_")
    assert layer["calls"] == 2 * LAYERS and layer["self_s"] > 0
    names = {e.get("name") for e in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]}
    assert "transkimmer::encoder_layer_" in names
    out = capsys.readouterr().out
    assert "transkimmer::encoder_layer_" in out and "by layer" in out and "launch gaps" not in out


def test_another_contender_has_operators_alone(options: list[str], tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    assert main([*options, "--contender", "plain", "--json", str(data)]) == 0
    (row,) = json.loads(data.read_text(encoding="utf-8"))["rows"]
    assert row["layers"] == [] and any(o["name"] == "aten::addmm" for o in row["operators"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--repeats", "0"], "transkimmer profile: --repeats 0: must be at least 1"),
        (["--top", "0"], "--top 0: must be at least 1"),
        (["--contender", "onnx", "--dtype", "bf16"], "--contender onnx: "),
    ],
)
def test_refused_arguments(
    options: list[str], extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, *extra]) == 2
    assert message in capsys.readouterr().err
