"""The field of `bench model`: contenders are built once where that holds, checked, and their memory is counted."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from transkimmer.bench import field, peers

from ..clock import Clock
from .tiny_workload import SETTING, batches


@pytest.mark.usefixtures("memory_calls")
def test_peers_are_built_once_for_all_workloads_of_a_model_and_dtype(
    subject: peers.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[str, str]] = []

    def peer(key: str, *, ours: bool) -> peers.Peer:
        def build(subject: peers.Subject, example: object, dtype: str) -> peers.Run:
            built.append((key, dtype))
            return lambda inputs: subject.dense(**inputs).logits

        return peers.Peer(key, key, build, ours=ours)

    monkeypatch.setattr(field, "PEERS", (peer("other", ours=False), peer("ours", ours=True)))
    reused = field.Field()
    bf16 = replace(SETTING, dtype="bf16")
    for here in (SETTING, replace(SETTING, lengths="others"), bf16, replace(bf16, model="another")):
        reused.enter(here, subject, batches())
    ours, other = ("ours", "fp32"), ("other", "fp32")
    both = [("other", "bf16"), ("ours", "bf16")]
    assert built == [other, ours, ours, *both, *both]  # ours anew for every workload: its schedule is another one


@pytest.mark.usefixtures("memory_calls")
def test_a_contender_that_would_take_too_long_is_left_out(
    subject: peers.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    calls: list[int] = []

    def compiling(*arguments: object) -> peers.Run:
        """Slow when it is built and at the next call."""

        def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            calls.append(1)
            clock.sleep(0.2 if len(calls) == 2 else 0.0)
            return subject.dense(**inputs).logits

        return run

    def slow(*arguments: object) -> peers.Run:
        return lambda inputs: clock.sleep(0.2)  # type: ignore[func-returns-value]

    ours = next(peer for peer in peers.PEERS if peer.key == "keep-all")
    monkeypatch.setattr(
        field, "PEERS", (peers.Peer("slow", "slow", slow), peers.Peer("compiling", "compiling", compiling), ours)
    )
    entered = dict(field.Field(budget_s=0.3).enter(SETTING, subject, batches()))
    found = {peer.key: entry if isinstance(entry, str) else "there" for peer, entry in entered.items()}
    note = "left out: 0 s for one batch; 2 batches would exceed --budget"
    assert found == {"slow": note, "compiling": "there", "keep-all": "there"}


@pytest.mark.parametrize("compiles_sizes", [True, False])
@pytest.mark.usefixtures("memory_calls")
def test_a_contender_that_compiles_sizes_is_built_for_its_first_batch(
    subject: peers.Subject, compiles_sizes: bool
) -> None:
    """The others for two sequences of two lengths, of which no size is a constant and no mask superfluous."""
    given: list[list[int]] = []

    def build(subject: peers.Subject, example: dict[str, torch.Tensor], dtype: str) -> peers.Run:
        given.append(example["attention_mask"].sum(1).tolist())
        return lambda inputs: subject.dense(**inputs).logits

    with torch.no_grad():
        field._build(peers.Peer("x", "x", build, compiles_sizes=compiles_sizes), subject, SETTING, batches()[1])
    assert given == [[14, 6] if compiles_sizes else [12, 7]]


def peer_of(run: peers.Run) -> peers.Peer:
    return peers.Peer("x", "x", lambda *arguments: run, ours=True)


@pytest.mark.parametrize(
    ("dtype", "error", "refused"),
    [("fp32", 5e-5, False), ("fp32", 5e-4, True), ("bf16", 0.03, False), ("bf16", 0.1, True)],
)
@pytest.mark.usefixtures("memory_calls")
def test_answers_are_held_to_the_accuracy_of_their_dtype(
    subject: peers.Subject, dtype: str, error: float, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = peer_of(lambda inputs: (1 + error) * subject.dense(**inputs).logits)
    monkeypatch.setattr(field, "PEERS", (peer,))
    with pytest.raises(field.WrongAnswersError) if refused else contextlib.nullcontext():
        field.Field().enter(replace(SETTING, dtype=dtype), subject, batches())


@pytest.mark.usefixtures("memory_calls")
def test_answers_may_lie_where_those_of_the_next_batch_will(
    subject: peers.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a graph do."""
    buffer = torch.empty(2, 2)
    monkeypatch.setattr(field, "PEERS", (peer_of(lambda inputs: buffer.copy_(subject.dense(**inputs).logits)),))
    ((_, found),) = field.Field().enter(SETTING, subject, batches())
    assert isinstance(found, field.Checked) and found.max_difference < 1e-5


@pytest.mark.parametrize("wrong", [0, 1])
def test_the_difference_is_the_largest_of_all_batches_over_the_largest_logit(
    subject: peers.Subject, wrong: int
) -> None:
    with torch.no_grad():
        reference = field.Reference(subject, batches())
        answers = [subject.dense(**batch.inputs).logits for batch in batches()]
    largest = [float(logits.abs().max()) for logits in answers]
    assert min(largest) < 0.9 * max(largest)
    answers[wrong][1, 0] += 0.5
    assert reference.difference(answers, None) == pytest.approx(0.5 / max(largest), rel=1e-3)


def test_peak_memory_is_that_at_rest_and_while_it_runs(
    subject: peers.Subject, memory_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from the start of the check: building may have taken more."""

    def build(*arguments: object) -> peers.Run:
        memory_calls.append("build")

        def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            memory_calls.append("run")
            return subject.dense(**inputs).logits

        return run

    monkeypatch.setattr(field, "PEERS", (peers.Peer("one", "one", build),))
    ((_, found),) = field.Field().enter(SETTING, subject, batches()[:1])
    assert isinstance(found, field.Checked)
    assert found.built.memory == 1000 and found.peak_memory == 1050
    assert memory_calls == ["watch", "build", "run", "reset", "peak", "watch", "reset", "run", "run", "peak"]
