"""Training by graphs, tapes on the CPU: the loss and the gradients of an eager step, whatever the batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transkimmer.graphed_training import _Step

from .graphed_steps import BATCHES, assert_close, assert_step, eagerly, gradients, graphed, loss_of, step
from .tiny import ARCHITECTURES, no_dropout

pytestmark = [
    pytest.mark.default_kernels("is about what stands around the kernels, and too long for an interpreter"),
    pytest.mark.usefixtures("step_tapes"),
]
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
SHORTER = (9, 1, 6, 2)  # than the first of `BATCHES`, by the same graph


@every_architecture
def test_steps_equal_eager_ones(architecture: str) -> None:
    model = graphed(architecture)
    for lengths in (*BATCHES, BATCHES[0]):
        assert_step(model, lengths)
    assert len(model.skimming.training_graphs) == 3
    assert model.skimming.training_graphs.bytes_held > sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("config", [{"skim_attention": "published"}, {"predictor_width": 8}, {"temperature": 0.3}])
def test_configurations(config: dict[str, Any]) -> None:
    assert_step(graphed(**config), BATCHES[0])


def test_without_skimming() -> None:
    model = graphed()
    model.skimming.enabled = False
    loss, actual, _ = step(model, BATCHES[0])
    assert model.skimming.training_graphs.why_eager is None
    expected_loss, expected, _ = eagerly(model, lambda twin: step(twin, BATCHES[0]))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(actual, expected)


def test_it_trains() -> None:
    """Weights that an optimizer changes in place, and settings of the draws, are followed without a new capture."""
    model = graphed()
    twin = copy.deepcopy(model)
    twin.skimming.graphed_training = False
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, twin)]
    for number in range(5):
        losses = []
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            m.skimming.config.temperature = 1 / (1 + number)
            m.skimming.config.skim_weight = 0.1 * number
            loss = loss_of(m, BATCHES[number % 3])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert model.skimming.training_graphs.why_eager is None and len(model.skimming.training_graphs) == 1


def test_noise_and_temperature_are_those_of_the_step() -> None:
    """Not those of the capture. The batch fills its graph: draws are as without."""
    model = graphed()
    without = step(model, BATCHES[0])[2].keep_masks
    model.skimming.config.noise, model.skimming.config.temperature = 0.5, 0.3
    assert_step(model, BATCHES[0])
    assert not torch.equal(step(model, BATCHES[0])[2].keep_masks, without)
    assert len(model.skimming.training_graphs) == 1


def test_rows_left_over_have_no_gradient() -> None:
    """Not even that of an earlier batch, which had sequences where a shorter one leaves rows over."""
    model = graphed()
    for lengths in (BATCHES[0], SHORTER):
        assert_step(model, lengths)
    assert len(model.skimming.training_graphs) == 1


def test_a_broken_batch_does_not_outlive_its_step() -> None:
    model = graphed()
    step(model, BATCHES[0])
    weight = model.bert.embeddings.word_embeddings.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    assert math.isnan(step(model, BATCHES[0])[0])
    with torch.no_grad():
        weight.copy_(kept)
    assert_step(model, SHORTER)
    assert len(model.skimming.training_graphs) == 1


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_add_up_over_steps(set_to_none: bool) -> None:
    def work(model: PreTrainedModel) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        for lengths in (BATCHES[0], BATCHES[1]):
            loss_of(model, lengths).backward()
        model.zero_grad(set_to_none=set_to_none)
        for lengths in (BATCHES[1], BATCHES[3], BATCHES[0]):
            loss_of(model, lengths).backward()
        return gradients(model)

    model = graphed()
    assert_close(work(model), eagerly(model, work))


def test_gradients_that_are_kept_stay_what_they_are() -> None:
    model = graphed()
    parameters = [p for p in model.parameters() if p.dim() == 2]
    kept = torch.autograd.grad(loss_of(model, BATCHES[0]), parameters, allow_unused=True)
    copies = [None if g is None else g.clone() for g in kept]
    loss_of(model, BATCHES[1]).backward()
    assert all(a is None or torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_a_step_within_another_runs_eagerly() -> None:
    def work(model: PreTrainedModel) -> tuple[dict[str, Tensor], list[str | None]]:
        model.zero_grad(set_to_none=True)
        graphs, reasons = model.skimming.training_graphs, []
        first = loss_of(model, BATCHES[0])
        reasons.append(graphs and graphs.why_eager)
        second = loss_of(model, BATCHES[1])
        reasons.append(graphs and graphs.why_eager)
        (first + 2 * second).backward()
        return gradients(model), reasons

    model = graphed()
    actual, reasons = work(model)
    assert reasons == [None, "the last step has not gone backwards yet"]
    assert_close(actual, eagerly(model, work)[0])
    assert_step(model, BATCHES[0])


def test_a_step_that_is_dropped_does_no_harm() -> None:
    model = graphed()
    loss_of(model, BATCHES[0])
    assert_step(model, BATCHES[1])


def test_backwards_twice_is_refused() -> None:
    model = graphed()
    loss = loss_of(model, BATCHES[0])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backwards once"):
        loss.backward()


def test_second_derivatives_are_refused() -> None:
    model = graphed()
    weight = model.bert.encoder.layer[1].output.dense.weight
    (gradient,) = torch.autograd.grad(loss_of(model, BATCHES[0]), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_frozen_parameters_and_embeddings() -> None:
    model = graphed()
    assert_step(model, BATCHES[0])
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    assert_step(model, BATCHES[0])
    assert len(model.skimming.training_graphs) == 2
    model.requires_grad_(True)
    assert_step(model, BATCHES[0])
    model.bert.encoder.layer[1].requires_grad_(False)
    assert_step(model, BATCHES[0])
    model.bert.encoder.requires_grad_(False)
    assert_step(model, BATCHES[0], why_eager="nothing in the encoder is trained")


def test_what_is_frozen_first_and_trained_later() -> None:
    model = graphed()
    model.bert.encoder.layer[0].requires_grad_(False)
    assert_step(model, BATCHES[0])
    model.requires_grad_(True)
    assert_step(model, BATCHES[0])


def test_dropout_follows_its_rate() -> None:
    model = graphed()
    assert_step(model, BATCHES[0])
    for module in model.bert.encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    loss, _, _ = step(model, BATCHES[0])
    assert model.skimming.training_graphs.why_eager is None and len(model.skimming.training_graphs) == 2
    without = eagerly(model, lambda twin: step(no_dropout(twin), BATCHES[0])[0])
    assert abs(loss - without) > 1e-3


class Adapted(torch.nn.Module):
    """A linear layer beside which something small, with dropout of its own, is trained."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.dropout = base, torch.nn.Dropout(0.5)
        self.down = torch.nn.Linear(base.in_features, 4)
        self.up = torch.nn.Linear(4, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.dropout(x)))


def _adapted(layer: Any) -> None:
    layer.intermediate.dense = Adapted(layer.intermediate.dense)


def _activated_at_random(layer: Any) -> None:
    layer.intermediate.intermediate_act_fn = torch.nn.RReLU()


@pytest.mark.parametrize("change", [_adapted, _activated_at_random])
def test_what_draws_is_not_computed_anew(change: Callable[[Any], None]) -> None:
    """Another draw on the way back would lead to other gradients. The batch fills its graph: draws are as without."""
    model = graphed()
    torch.manual_seed(3)
    for layer in model.bert.encoder.layer:
        change(layer)
    model.train()
    assert_step(model, BATCHES[0])


def test_a_change_between_the_two_ways_is_refused() -> None:
    model = graphed()
    loss = loss_of(model, BATCHES[0])
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_a_capture_has_leaves_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the model may be tied to another stream by an eager step whose results are alive."""
    model, seen, forward = graphed(), [], _Step._forward
    part = model.bert.encoder.layer[0].output.dense
    weight = part.weight
    monkeypatch.setattr(_Step, "_forward", lambda self: (seen.append(part.weight), forward(self))[1])
    assert_step(model, BATCHES[0])
    assert seen and all(w is not weight and w.data_ptr() == weight.data_ptr() for w in seen)
    assert part.weight is weight


def test_parameters_that_lie_elsewhere() -> None:
    model = graphed()
    assert_step(model, BATCHES[0])
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.data = torch.zeros(64, 128)
    assert_step(model, BATCHES[0])
    assert len(model.skimming.training_graphs) == 1


def test_autocast() -> None:
    def work(model: PreTrainedModel) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, BATCHES[0])
        loss.backward()
        return gradients(model)

    model = graphed()
    assert_close(work(model), eagerly(model, work), tolerance=0.02)
    assert model.skimming.training_graphs.why_eager is None
    assert_step(model, BATCHES[0])  # without, by another graph
    assert len(model.skimming.training_graphs) == 2


def test_draws_are_new_in_every_step() -> None:
    model = graphed(noise=1.0)
    masks = [step(model, BATCHES[0], seed)[2].keep_masks for seed in (1, 2, 3, 1)]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    assert torch.equal(masks[0], masks[3])


def test_a_capture_draws_nothing() -> None:
    """The generator is where it was, so that what comes after does not depend on when a size is captured."""
    model = graphed(noise=1.0)
    step(model, BATCHES[0])
    after = torch.rand(1)
    step(model, BATCHES[0])
    assert torch.equal(torch.rand(1), after)
