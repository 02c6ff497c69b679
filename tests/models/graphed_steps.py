"""Training steps by graphs, tapes on the CPU, and what an eager step of the same model gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transkimmer import SkimConfig, add_skimming, record_skimming
from transkimmer.records import SkimRecord

from ..tape import Tape, TapeEngine
from .tiny import no_dropout, padded_inputs, tiny, undecided_predictors

# As many tokens as fill a graph; fewer, in other lengths, by the same graph; by others: more sequences, longer ones.
BATCHES = ((14, 2, 9, 7), (9, 14, 6, 2), (14, 14, 1, 2), (5, 9, 1, 14, 5), (30, 1, 33))


class StepTapes(TapeEngine):
    """Poisons what a forward leaves only before the next one: a backward needs it."""

    last: StepTapes

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        StepTapes.last = self

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        yield

    def recorded(self, tape: Tape) -> None:
        """A backward is recorded over the values of its forward."""

    def poison(self) -> None:
        for tape in self._tapes:
            tape.poison()


def graphed(architecture: str = "bert", **config: Any) -> PreTrainedModel:
    """Without dropout, and with decisions that are not drawn unless `noise` is given."""
    model = add_skimming(no_dropout(tiny(architecture, "sequence")), SkimConfig(**{"noise": 0.0, **config}))
    undecided_predictors(model)
    model.skimming.cuda_graphs = "off"
    model.skimming.graphed_training = True
    return model.train()


def loss_of(model: PreTrainedModel, lengths: tuple[int, ...], seed: int = 0) -> Tensor:
    inputs = padded_inputs(lengths)
    torch.manual_seed(seed)
    return model(**inputs, labels=torch.arange(len(lengths)) % 2).loss


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(
    model: PreTrainedModel, lengths: tuple[int, ...], seed: int = 0
) -> tuple[float, dict[str, Tensor], SkimRecord]:
    model.zero_grad(set_to_none=True)
    with record_skimming() as records:
        loss = loss_of(model, lengths, seed)
        loss.backward()
    return loss.item(), gradients(model), records[0]


def eagerly(model: PreTrainedModel, work: Callable[[PreTrainedModel], Any]) -> Any:
    twin = copy.deepcopy(model)
    twin.skimming.graphed_training = False
    return work(twin)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert list(actual) == list(expected)
    scale = max(float(x.abs().max()) for x in expected.values())
    for name, gradient in expected.items():
        size = max(float(gradient.abs().max()), 1e-2 * scale)
        assert (actual[name] - gradient).abs().max() <= tolerance * size, name


def assert_step(model: PreTrainedModel, lengths: tuple[int, ...], why_eager: str | None = None) -> None:
    if len(model.skimming.training_graphs):
        StepTapes.last.poison()
    loss, actual, record = step(model, lengths)
    assert model.skimming.training_graphs.why_eager == why_eager
    expected_loss, expected, expected_record = eagerly(model, lambda twin: step(twin, lengths))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(actual, expected)
    assert torch.equal(record.keep_masks, expected_record.keep_masks)
    for logit, expected_logit in zip(record.logits, expected_record.logits, strict=True):
        torch.testing.assert_close(logit, expected_logit, rtol=1e-4, atol=1e-4, equal_nan=True)
