"""bench training: the masked baseline is the published one, and no contender is timed for another loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transkimmer import SkimConfig, add_skimming, record_skimming
from transkimmer.bench import masked, peers, setting, training, workload
from transkimmer.bench.timing import Limits
from transkimmer.cli import main
from transkimmer.records import SkimRecord, current_records
from transkimmer.training_forward import decisions_without_noise

from ..models.tiny import VOCABULARY, no_dropout, tiny, undecided_predictors
from .tiny_workload import SETTING, batches

ALL_LEARNERS = training.LEARNERS | training.GRAPHED_LEARNERS


def test_masked_training_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of our packed form with `skim_attention="published"`, where the draws are the same."""
    config = SkimConfig(skim_attention="published")
    packed = no_dropout(add_skimming(tiny("bert", "sequence"), config))
    undecided_predictors(packed)
    published = masked.PublishedTraining(
        no_dropout(tiny("bert", "sequence")), packed.skimming.predictors, config.temperature
    )
    packed.train()
    published.model.train()
    monkeypatch.setattr(masked, "logistic_noise", torch.zeros_like)
    monkeypatch.setattr("transkimmer.training_forward.logistic_noise", torch.zeros_like)
    inputs, labels = batches()[0].inputs, torch.tensor([0, 1])
    ours = packed(**inputs, labels=labels).loss
    theirs = published.model(**inputs, labels=labels).loss + config.skim_weight * published.skim_loss
    assert 0.2 < float(published.skim_loss.detach()) < 0.9  # something is skimmed
    torch.testing.assert_close(theirs, ours)
    parameters = (packed.bert.embeddings.word_embeddings.weight, packed.skimming.predictors[0].fc.weight)
    gradients = torch.autograd.grad(ours, parameters)
    mirrored = (published.model.bert.embeddings.word_embeddings.weight, parameters[1])
    for expected, actual in zip(gradients, torch.autograd.grad(theirs, mirrored), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("memory_calls")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_learner_has_a_row(subject: peers.Subject, dtype: str) -> None:
    here = setting.Setting("tiny", "some", "1,0.6,0.2", 2, 2, dtype, "cpu", 1)
    before = [parameter.clone() for parameter in subject.skimming.parameters()]
    rows = training.measure(here, subject, batches(), 2, Limits(math.inf))
    assert [row["contender"] for row in rows] == list(training.LEARNERS)
    for row in rows:
        assert row["tokens"] == 33 and row["repeats"] == len(row["seconds"]) == 2
        assert row["tokens_per_s"] == 33 / row["median_s"] and row["max_difference"] <= row["tolerance"]
        assert set(row["speedups"]) == set(training.LEARNERS) - {row["contender"]}
        # Of 9, 4, 14 and 6 tokens at ratios of 1, 0.6 and 0.2, at least one each.
        assert row["tokens_scheduled"] == (
            (33 + 5 + 2 + 8 + 4 + 2 + 1 + 3 + 1) / 99 if row["contender"] in training.SKIMS else None
        )
        assert (row["tokens_kept"] is None) == (row["tokens_scheduled"] is None)
    for parameter, old in zip(subject.skimming.parameters(), before, strict=True):
        assert torch.equal(parameter, old)  # the subject is also the next workload's


@pytest.mark.parametrize("name", ALL_LEARNERS)
def test_a_step_trains(subject: peers.Subject, name: str) -> None:
    """Everything, except the predictors where nothing is skimmed."""
    learner = training.Learner(name, *ALL_LEARNERS[name](subject, torch.float32))
    before = {key: parameter.detach().clone() for key, parameter in learner.model.named_parameters()}
    learner.step(batches()[0].inputs)
    still = {key for key, parameter in learner.model.named_parameters() if torch.equal(parameter, before[key])}
    predictors = {key for key in before if "skim_predictors" in key}
    skims = name in training.SKIMS
    assert bool(predictors) == (name != training.DENSE)
    assert still == (set() if skims else predictors)


@pytest.mark.parametrize("name", training.SKIMS)
def test_draws_keep_what_the_schedule_keeps(subject: peers.Subject, name: str) -> None:
    """In all contenders that skim, on average; the schedule ends with first tokens alone."""
    subject.skimming.skimming.config.schedule = [0.6, 0.6, 0.05]
    some = workload.random_batches([40, 9, 31, 25, 18, 14], 3, 2, VOCABULARY)
    scheduled, share = training._by_schedule(subject, some)
    counts = [*2 * [24 + 5 + 19 + 15 + 11 + 8], 2 + 1 + 2 + 1 + 1 + 1]
    assert share == sum(counts) / (3 * 137)
    learner = training.Learner(name, *ALL_LEARNERS[name](scheduled, torch.float32))
    torch.manual_seed(0)
    kept = [training._tokens_kept(learner, some) for _ in range(20)]
    assert sum(kept) / 20 == pytest.approx(share, abs=0.02) and max(kept) < 0.6
    assert subject.skimming.skimming.predictors[1].out.bias[1] > 4  # the subject's own still keep everything


def test_pruned_training_has_the_loss_of_packed_training(subject: peers.Subject) -> None:
    subject, _ = training._by_schedule(subject, batches())
    losses = []
    for name in (training.PACKED, training.PRUNED):
        learner = training.Learner(name, *ALL_LEARNERS[name](subject, torch.float32))
        no_dropout(learner.model)
        with decisions_without_noise(0.0), record_skimming() as records:
            inputs = batches()[0].inputs
            losses.append(learner.loss(inputs, training.labels_of(inputs)).item())
        assert 0.2 < records[0].tokens_kept.mean() < 0.9
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_another_loss_is_not_timed(subject: peers.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(subject: peers.Subject, dtype: torch.dtype) -> tuple[torch.nn.Module, training.Loss]:
        model, loss = training._dense(subject, dtype)
        return model, lambda inputs, labels: loss({"input_ids": inputs["input_ids"]}, labels)

    monkeypatch.setitem(training.LEARNERS, training.DENSE, forgetful)
    with pytest.raises(ValueError, match=r"^dense, padded \(Hugging Face SDPA\): its loss differs"):
        training.measure(SETTING, subject, batches(), 1, Limits())


def test_a_loss_that_is_not_a_number_in_a_later_batch_is_not_timed(
    subject: peers.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's max() would pass over it."""
    first = batches()[0].inputs["input_ids"]

    def broken(subject: peers.Subject, dtype: torch.dtype) -> tuple[torch.nn.Module, training.Loss]:
        model, loss = training._dense(subject, dtype)

        def value(inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
            return loss(inputs, labels) * (1.0 if torch.equal(inputs["input_ids"], first) else math.nan)

        return model, value

    monkeypatch.setitem(training.LEARNERS, training.DENSE, broken)
    with pytest.raises(ValueError, match=r"^dense, padded \(Hugging Face SDPA\): its loss differs .* by nan"):
        training.measure(SETTING, subject, batches(), 1, Limits())


# What learners are


@pytest.mark.parametrize("name", training.LEARNERS)
def test_a_learner_computes_in_the_dtype_of_its_row(subject: peers.Subject, name: str) -> None:
    made, _ = training.LEARNERS[name](subject, torch.bfloat16)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in subject.skimming.parameters()} == {torch.float32}


def test_learners_skim_prune_and_are_graphed_as_they_are_called(subject: peers.Subject) -> None:
    found = {}
    for name, make in ALL_LEARNERS.items():
        skimming = getattr(make(subject, torch.float32)[0], "skimming", None)
        if skimming is not None:
            found[name] = skimming.enabled, skimming.config.pruned_training, skimming.graphed_training
    assert found == {
        training.DENSE_PACKED: (False, False, False),
        training.PACKED: (True, False, False),
        training.PRUNED: (True, True, False),
        training.DENSE_GRAPHED: (False, False, True),
        training.GRAPHED: (True, False, True),
    }


def test_dense_has_no_dropout_on_attention_probabilities_alone(subject: peers.Subject) -> None:
    made, _ = training.LEARNERS[training.DENSE](subject, torch.float32)
    rates = {name.partition("layer.0.")[2]: m.p for name, m in made.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert rates["attention.self.dropout"] == 0.0
    assert rates["attention.output.dropout"] == rates["output.dropout"] == 0.1


def test_the_masked_baseline_has_the_subjects_temperature(
    subject: peers.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    published = training.PublishedTraining
    monkeypatch.setattr(training, "PublishedTraining", lambda *rest: (given.append(rest[2]), published(*rest))[1])
    subject.skimming.skimming.config.temperature = 0.25
    training.LEARNERS[training.PUBLISHED](subject, torch.float32)
    assert given == [0.25]


@pytest.mark.parametrize("name", ALL_LEARNERS)
def test_a_step_leaves_no_gradients(subject: peers.Subject, name: str) -> None:
    """They would be added to those of the next one."""
    learner = training.Learner(name, *ALL_LEARNERS[name](subject, torch.float32))
    learner.step(batches()[0].inputs)
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_the_check_leaves_dropout_and_predictors_as_they_were(subject: peers.Subject) -> None:
    """What keeps everything would otherwise be timed as skimming."""
    scheduled, _ = training._by_schedule(subject, batches())
    learner = training.Learner(training.PRUNED, *training.LEARNERS[training.PRUNED](scheduled, torch.float32))

    def rates() -> list[float]:
        return [module.p for module in learner.model.modules() if isinstance(module, torch.nn.Dropout)]

    state, before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}, rates()
    expected = [float(loss) + SkimConfig().skim_weight for loss in training._reference_losses(scheduled, batches())]
    training._check(learner, batches(), expected, SETTING)
    assert all(torch.equal(tensor, state[name]) for name, tensor in learner.model.state_dict().items())
    assert rates() == before and max(before) == 0.1


# What rows say


def test_tokens_kept_are_a_ratio_of_sums() -> None:
    """One batch of 30 tokens that keeps half of them, and one of 10 that keeps all."""
    shares = iter([0.5, 1.0])

    def loss(inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        ends = torch.nn.functional.pad(inputs["attention_mask"].sum(1).cumsum(0), (1, 0)).int()
        records = current_records()
        assert records is not None and labels.tolist() == [0, 1]
        records.append(SkimRecord((2, inputs["input_ids"].size(1)), ends, skim_loss=torch.tensor(next(shares))))
        return torch.zeros(())

    learner: Any = SimpleNamespace(loss=loss)
    given = workload.random_batches([20, 10, 6, 4], 2, 2, VOCABULARY)
    assert training._tokens_kept(learner, given) == pytest.approx(25 / 40)


def test_memory_is_that_of_steps_which_are_not_the_first(
    subject: peers.Subject, memory_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training.Learner.step
    monkeypatch.setattr(
        training.Learner, "step", lambda self, inputs: (memory_calls.append("step"), step(self, inputs))[1]
    )
    monkeypatch.setattr(training, "LEARNERS", {training.DENSE_PACKED: training.LEARNERS[training.DENSE_PACKED]})
    monkeypatch.setattr(training, "time_in_turn", lambda *arguments: {training.DENSE_PACKED: [1.0]})
    (row,) = training.measure(SETTING, subject, batches(), 1, Limits(math.inf))
    assert memory_calls == ["watch", "step", "step", "reset", "step", "step", "peak"] and row["peak_memory"] == 1000


@pytest.mark.parametrize(("peak", "total"), [(1000, 1200), (None, None)])
def test_memory_of_graphs_counts(peak: int | None, total: int | None) -> None:
    learner: Any = SimpleNamespace(graphs=SimpleNamespace(pool_bytes=200))
    without: Any = SimpleNamespace(graphs=None)
    assert training._with_graphs(peak, learner) == total and training._with_graphs(peak, without) == peak


def test_a_row_says_where_it_is_of_no_graphs() -> None:
    def note(graphs: object) -> dict[str, str]:
        learner: Any = SimpleNamespace(graphs=graphs)
        return training._note(learner)

    assert note(None) == note(SimpleNamespace(why_eager=None)) == {}
    assert note(SimpleNamespace(why_eager="no such thing")) == {"note": "without graphs: no such thing"}


def test_the_command(tmp_path: Path) -> None:
    tiny("bert", "sequence").save_pretrained(tmp_path / "model")
    file = tmp_path / "rows.json"
    options = ["--model", str(tmp_path / "model"), "--lengths", "sst2", "--schedule", "1,0.6,0.2", "--batch-size", "3"]
    assert main(["bench", "training", *options, "--batches", "1", "--repeats", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [(row["kind"], row["contender"]) for row in rows] == [("training", name) for name in training.LEARNERS]
