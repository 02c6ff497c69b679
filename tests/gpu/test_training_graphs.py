"""Training steps by CUDA graphs: gradients of eager steps, for every batch, with a loader at work beside them."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transkimmer import record_skimming
from transkimmer.graphed_training import _Step

from .conftest import ON_DEVICE, Place, dtypes, inputs, skimming_bert

pytestmark = pytest.mark.gpu
on_device = pytest.mark.parametrize("place", ON_DEVICE, ids=str)
BATCHES = ((65, 1, 17, 96), (96, 96, 96, 96), (1, 1, 1, 1), (3, 64, 2, 31), (64, 5, 0, 33, 7), (65, 1, 17, 96))


def graphed(place: Place, dtype: torch.dtype, noise: float = 0.0) -> PreTrainedModel:
    place.require(dtype)
    model = skimming_bert(place, dtype).train()
    model.skimming.config.noise = noise
    model.skimming.graphed_training = True
    return model


def step(model: PreTrainedModel, batch: dict[str, Tensor], zero: bool = True) -> dict[str, Tensor]:
    """Gradients of a loss that every real token and every decision has a part in; after earlier ones, if not `zero`."""
    if zero:
        model.zero_grad(set_to_none=True)
    with record_skimming() as records:
        output = model(**batch).last_hidden_state.float()
    weight = torch.linspace(-1, 1, output.size(-1), device=output.device)
    real = batch["attention_mask"].bool()
    loss = (output * weight)[real].square().mean() + records[0].skim_loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert list(actual) == list(expected)
    scale = max(float(x.abs().max()) for x in expected.values())
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for name, gradient in expected.items():
        assert (actual[name].float() - gradient.float()).abs().max() <= tolerance * scale, name


@dtypes
@on_device
def test_gradients_are_those_of_eager_steps(place: Place, dtype: torch.dtype) -> None:
    model = graphed(place, dtype)
    eager = copy.deepcopy(model)
    eager.skimming.graphed_training = False
    for seed, lengths in enumerate(BATCHES):
        batch = inputs(lengths, place.device, seed=seed)
        assert_close(step(model, batch), step(eager, batch), dtype)
        assert model.skimming.training_graphs.why_eager is None
    assert len(model.skimming.training_graphs) == 5


@on_device
def test_gradients_add_up(place: Place) -> None:
    model = graphed(place, torch.float32)
    eager = copy.deepcopy(model)
    eager.skimming.graphed_training = False
    for seed, lengths in enumerate((BATCHES[0], BATCHES[3], BATCHES[1], BATCHES[0])):
        batch = inputs(lengths, place.device, seed=seed)
        actual, expected = (step(m, batch, zero=seed == 0) for m in (model, eager))
        assert_close(actual, expected, torch.float32)
    assert model.skimming.training_graphs.why_eager is None


@on_device
def test_the_same_step_twice_has_the_same_gradients(place: Place) -> None:
    model, batch = graphed(place, torch.bfloat16), inputs(BATCHES[0], place.device)
    first, second = step(model, batch), step(model, batch)
    assert all(torch.equal(first[name], second[name]) for name in first)


@on_device
def test_draws_follow_the_seed(place: Place) -> None:
    model, batch, masks = graphed(place, torch.bfloat16, noise=1.0), inputs(BATCHES[1], place.device), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        with record_skimming() as records:
            model(**batch).last_hidden_state.sum().backward()
        masks.append(records[0].keep_masks)
    assert model.skimming.training_graphs.why_eager is None
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("attention", ["renormalized", "published"])
@on_device
def test_captured_after_eager_steps_that_are_still_alive(place: Place, attention: str, autocast: bool) -> None:
    """What eager steps leave behind belongs to a stream that is not captured."""
    model = graphed(place, torch.float32)
    model.skimming.config.skim_attention = attention
    model.skimming.training_graphs.uses_before = 2
    batch, alive, found = inputs(BATCHES[0], place.device), [], []
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(**batch).last_hidden_state.float().square().mean()
        loss.backward()
        alive.append(loss)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert model.skimming.training_graphs.why_eager is None and len(model.skimming.training_graphs) == 1
    assert_close(found[3], found[0], torch.bfloat16 if autocast else torch.float32)


@on_device
def test_a_capture_that_fails_ends_no_training(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphed(place, torch.float32, noise=1.0)
    model.skimming.training_graphs.uses_before = 1
    batches = [inputs(lengths, place.device) for lengths in (BATCHES[0], BATCHES[1])]
    assert step(model, batches[0]) and step(model, batches[0])
    assert model.skimming.training_graphs.why_eager is None
    forward = _Step._forward

    def waits(self: _Step) -> dict[str, Tensor]:
        float(self.hidden[0, 0])
        return forward(self)

    monkeypatch.setattr(_Step, "_forward", waits)
    step(model, batches[1])
    stream = torch.cuda.current_stream(place.device)
    with pytest.warns(UserWarning, match="trains without a CUDA graph"):
        step(model, batches[1])
    assert torch.cuda.current_stream(place.device) == stream
    assert "capturing failed" in str(model.skimming.training_graphs.why_eager)
    monkeypatch.undo()
    assert step(model, batches[0])  # captured anew
    assert model.skimming.training_graphs.why_eager is None


def _lengths(seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    return inputs(tuple(chance.randint(1, 96) for _ in range(chance.choice((8, 8, 3)))), "cpu", seed=seed)


@on_device
def test_it_trains_beside_a_loader_that_pins_memory(place: Place) -> None:
    """Captures happen while another thread allocates; a model that trains by graphs stays with one that does not."""
    model = graphed(place, torch.float32)
    eager = copy.deepcopy(model)
    eager.skimming.graphed_training = False
    both = (model, eager)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in both]
    loader = DataLoader([_lengths(seed) for seed in range(40)], batch_size=None, pin_memory=True, num_workers=2)
    for batch in loader:
        batch = {name: x.to(place.device, non_blocking=True) for name, x in batch.items()}
        for m, optimizer in zip(both, optimizers, strict=True):
            step(m, batch)
            optimizer.step()
    assert model.skimming.training_graphs.why_eager is None
    for name, p in eager.named_parameters():
        assert (model.get_parameter(name) - p).abs().max() <= 40 * 1e-4 * 0.5, name
