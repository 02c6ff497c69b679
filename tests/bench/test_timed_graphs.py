"""Timing on a device that captures graphs: no capture falls into a timed call; tapes on the CPU stand for it."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import PreTrainedModel
from transkimmer import SkimConfig, add_skimming
from transkimmer.bench import timing, workload
from transkimmer.bench.contenders import KEEP_ALL, SKIMMING, Contender, contenders

from transkimmer_kernels.runtime.graphs import ENGINES

from ..models.tiny import VOCABULARY, tiny
from ..tape import TapeEngine


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    monkeypatch.setitem(ENGINES, "cpu", TapeEngine)
    monkeypatch.setattr("transkimmer.encoder._known_to_start_in_front", lambda mask: False)
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    return add_skimming(tiny("bert", "sequence"), SkimConfig(schedule=[1.0, 0.6, 0.2]))


def ours(model: PreTrainedModel) -> list[Contender]:
    """As `evaluate` times them: dense and skimming, switched."""
    return [contender for contender in contenders(model) if contender.name in (KEEP_ALL, SKIMMING)]


def batches(*lengths: int) -> list[workload.Batch]:
    return [workload.random_batches([length, 3], 2, 1, VOCABULARY)[0] for length in lengths]


def timed(model: PreTrainedModel, *lengths: int) -> list[int]:
    """Captures before each timed call, and after the last one."""
    counts: list[int] = []
    field = ours(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: float(counts.append(model.skimming.graphs.captures) or len(counts)))
        with torch.inference_mode():
            timing.time_in_turn(field, batches(*lengths), 2, KEEP_ALL, device="cuda")
    return counts


def test_every_size_keeps_its_graph_while_it_is_timed(model: PreTrainedModel) -> None:
    graphs = model.skimming.graphs
    graphs.max_graphs = 3  # fewer than the six of three sizes, by two contenders
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(timed(model, 8, 14, 20)) == {6}
    assert graphs.max_graphs == 3
    assert model.skimming.why_eager is None and graphs.replays >= 2 * 6


def test_a_limit_that_holds_is_left_alone(model: PreTrainedModel) -> None:
    limits: list[int] = []
    field = ours(model)
    field[0].run = lambda inputs, run=field[0].run: (limits.append(model.skimming.graphs.max_graphs), run(inputs))[1]
    with torch.inference_mode():
        timing.time_in_turn(field, batches(8), 1, KEEP_ALL, device="cuda")
    assert set(limits) == {32}


def test_the_limit_comes_back_after_an_error(model: PreTrainedModel) -> None:
    def fail(inputs: object) -> torch.Tensor:
        assert model.skimming.graphs.max_graphs == 6
        raise RuntimeError("no such thing")

    model.skimming.graphs.max_graphs = 1
    with pytest.raises(RuntimeError, match="no such thing"):
        timing.time_in_turn([*ours(model), Contender("broken", fail)], batches(8, 14), 1, KEEP_ALL, device="cuda")
    assert model.skimming.graphs.max_graphs == 1


def test_captures_that_are_timed_are_told(model: PreTrainedModel) -> None:
    """Where the memory allowed to graphs is too small for all of them."""
    timed(model, 20)
    model.skimming.graphs.max_bytes = model.skimming.graphs.bytes_held
    with pytest.warns(UserWarning, match=r"CUDA graphs were captured in timed calls: max_bytes is too small"):
        timed(model, 8, 20)
