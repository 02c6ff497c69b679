"""From seconds to published figures: medians of paired ratios, spreads, the baseline, and what is added up."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from transkimmer.bench import field, model, peers, roofline, timing, training
from transkimmer.bench.contenders import KEEP_ALL, PADDED, PLAIN, SKIMMING, Contender
from transkimmer.bench.timing import Limits, compare, paired_speedup, relative_spread, time_in_turn
from transkimmer.flops import EncoderShape

from ..clock import Clock
from .tiny_workload import LENGTHS, SETTING, batches

# Median, mean, least, largest and first lie apart; PLAIN has the least median of the two that may be the baseline.
TIMES = {PADDED: [9.0, 8.0, 5.0], PLAIN: [5.0, 1.0, 3.0], KEEP_ALL: [4.0, 4.0, 4.5], SKIMMING: [1.0, 2.0, 1.5]}
MEDIANS = {PADDED: 8.0, PLAIN: 3.0, KEEP_ALL: 4.0, SKIMMING: 1.5}


class Timed:
    """In place of `time_in_turn`: gives these seconds, and remembers what it was asked besides the rounds."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds = seconds
        self.asked: list[object] = []

    def __call__(self, running: object, given: object, repeats: int, *rest: object) -> dict[str, list[float]]:
        self.asked.append(rest)
        return self.seconds


@pytest.mark.parametrize(
    ("baseline", "times", "speedup"),
    [
        ([9.0, 2.0, 4.0, 100.0], [1.0, 2.0, 4.0], 1.0),  # 9, 1 and 1: not their mean, nor that of the medians, 3.25
        ([9.0], [1.0, 20.0, 20.0], 9.0),  # a baseline that dropped out after its first round
    ],
)
def test_a_speedup_is_the_median_of_paired_ratios(baseline: list[float], times: list[float], speedup: float) -> None:
    assert paired_speedup(baseline, times) == speedup


@pytest.mark.parametrize(("times", "spread"), [([4.0, 2.0], 2 / 3), ([2.0, 6.0, 1.0], 2.5)])
def test_a_spread_is_relative_to_the_median(times: list[float], spread: float) -> None:
    assert relative_spread(times) == pytest.approx(spread)


def test_the_time_of_a_round_is_that_of_all_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    seconds = {14: 0.25, 9: 0.5}  # by the longest sequence: one batch takes another time than the other

    def run(inputs: dict[str, torch.Tensor], factor: float) -> None:
        clock.sleep(factor * seconds[inputs["input_ids"].size(1)])

    running = [Contender(name, partial(run, factor=factor)) for name, factor in (("a", 1.0), ("b", 2.0))]
    assert time_in_turn(running, batches(), 2, "a") == {"a": [0.75, 0.75], "b": [1.5, 1.5]}


def test_the_first_round_decides_what_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow spell of the machine in a later round takes no contender out: the median is there for it."""
    clock = Clock(monkeypatch)
    rounds = {"measure": iter([1.0, 0.01, 1.0]), "other": iter([2.0, 2.0, 2.0]), "spell": iter([1.0, 50.0, 1.0])}
    running = [Contender(name, lambda inputs, left=left: clock.sleep(next(left))) for name, left in rounds.items()]
    seconds = time_in_turn(running, batches()[:1], 3, "measure", Limits(slow=5.0))
    assert {name: len(times) for name, times in seconds.items()} == {"measure": 3, "other": 3, "spell": 3}


def test_bench_rows_of_known_times(subject: peers.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = subject.skimming.skimming

    def turns(*arguments: object) -> dict[str, list[float]]:
        switch.enabled = False  # as the dense run leaves it, which may be the last one
        return TIMES

    monkeypatch.setattr(timing, "time_in_turn", turns)
    rows = {row.name: row for row in compare(subject.skimming, batches(), 3)}
    assert {name: row.median_s for name, row in rows.items()} == MEDIANS
    speedups = {PADDED: 5 / 9, PLAIN: 1.0, KEEP_ALL: 2 / 3, SKIMMING: 2.0}
    assert {name: row.wall_clock_speedup for name, row in rows.items()} == pytest.approx(speedups)
    assert rows[SKIMMING].spread == pytest.approx(1 / 1.5)
    lengths, shape = torch.tensor(LENGTHS), EncoderShape.of_model(subject.skimming)
    less = shape.dense_flops(lengths) / shape.dense_flops(lengths, first_token_only=True)
    assert rows[PLAIN].flops_speedup == 1.0 and rows[KEEP_ALL].flops_speedup == less
    assert rows[SKIMMING].skim_efficiency == 2.0 / rows[SKIMMING].flops_speedup
    assert switch.enabled


@pytest.mark.parametrize("faster", [PLAIN, KEEP_ALL])
def test_the_baseline_is_the_faster_dense_run_without_padding(
    subject: peers.Subject, faster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slower = KEEP_ALL if faster == PLAIN else PLAIN
    monkeypatch.setattr(timing, "time_in_turn", Timed(TIMES | {faster: TIMES[PLAIN], slower: TIMES[KEEP_ALL]}))
    rows = {row.name: row for row in compare(subject.skimming, batches(), 3)}
    assert {name for name, row in rows.items() if row.wall_clock_speedup == row.flops_speedup == 1.0} == {faster}


def test_accuracy_and_agreement_are_of_a_contenders_own_answers(
    subject: peers.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = batches()
    for batch in given:
        batch.labels = torch.ones(2, dtype=torch.int64)
    running = timing.contenders(subject.skimming)
    for contender in running:
        logits = torch.eye(2)[[1, 0] if contender.name == SKIMMING else [0, 0]]
        contender.run = lambda inputs, run=contender.run, logits=logits: (run(inputs), logits)[1]
    monkeypatch.setattr(timing, "contenders", lambda model: running)
    monkeypatch.setattr(timing, "time_in_turn", Timed(TIMES))
    rows = {row.name: row for row in compare(subject.skimming, given, 3)}
    assert (rows[KEEP_ALL].accuracy, rows[KEEP_ALL].agreement) == (0.0, 1.0)
    assert (rows[SKIMMING].accuracy, rows[SKIMMING].agreement) == (0.5, 0.5)


@pytest.mark.usefixtures("memory_calls")
def test_model_rows_of_known_times(subject: peers.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ceilings are the higher ones of two probes."""
    probes = iter([roofline.Ceilings(1e10, 1e11), roofline.Ceilings(2e10, 5e10)])
    monkeypatch.setattr(model, "measure_ceilings", lambda device, dtype: next(probes))
    timed = Timed(TIMES)
    monkeypatch.setattr(model, "time_in_turn", timed)
    left_out = [peer.key for peer in peers.PEERS if peer.name not in TIMES]
    limits = Limits(7.0, 8.0)
    found = model.measure(SETTING, subject, batches(), field.Field(left_out), 3, limits)
    assert timed.asked == [(KEEP_ALL, limits, "cpu")]
    rows = {row["contender"]: row for row in found if row["note"] is None}
    assert {name: row["median_s"] for name, row in rows.items()} == MEDIANS
    assert {row["baseline"] for row in rows.values()} == {PLAIN}
    assert rows[SKIMMING]["speedups"] == pytest.approx({PADDED: 4.0, PLAIN: 2.0, KEEP_ALL: 3.0})
    assert rows[SKIMMING]["wall_clock_speedup"] == 2.0
    assert rows[PLAIN]["wall_clock_speedup"] == rows[PLAIN]["executed_flops_speedup"] == 1.0
    assert {tuple(row["ceilings"].values()) for row in rows.values()} == {(2e10, 1e11)}


@pytest.mark.usefixtures("memory_calls")
def test_training_rows_of_known_times(subject: peers.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed({name: [2.0, 6.0, 1.0] for name in training.LEARNERS} | {training.PACKED: [1.0, 1.0, 0.25]})
    monkeypatch.setattr(training, "time_in_turn", timed)
    limits = Limits(math.inf)
    rows = {row["contender"]: row for row in training.measure(SETTING, subject, batches(), 3, limits)}
    assert timed.asked == [(training.DENSE_PACKED, limits, "cpu")]
    dense = rows[training.DENSE]
    assert (dense["median_s"], dense["spread"], dense["tokens_per_s"]) == (2.0, 2.5, sum(LENGTHS) / 2)
    assert dense["speedups"][training.PACKED] == 0.25 and rows[training.PACKED]["speedups"][training.DENSE] == 4.0
