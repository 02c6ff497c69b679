"""Captured by the model itself: replays over random lengths, one launch each, and the host waits for nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .conftest import LONGEST, ON_DEVICE, Place, dtypes, inputs, skimming_bert
from .test_sync import no_waiting

pytestmark = pytest.mark.gpu
on_device = pytest.mark.parametrize("place", ON_DEVICE, ids=str)
LARGEST = 8


def _model(place: Place, dtype: torch.dtype) -> PreTrainedModel:
    place.require(dtype)
    model = skimming_bert(place, dtype)
    model.skimming.cuda_graphs = "auto"
    return model


@dtypes
@on_device
@torch.no_grad()
def test_a_thousand_replays_over_random_lengths_equal_eager(place: Place, dtype: torch.dtype) -> None:
    """By one graph, that of the largest size.

    Eager forwards of that size, filled up with empty sequences and padding, have the same kernels and add in the same
    order. Those of the batch's own size may not: how attention is cut into tiles depends on tokens per sequence, empty
    ones included.
    """
    model, chance = _model(place, dtype), random.Random(0)
    model.skimming.capture(LARGEST, LONGEST)
    for seed in range(1000):
        lengths = tuple(chance.randint(0, LONGEST) for _ in range(chance.randint(1, LARGEST)))
        batch = inputs(lengths, place.device, longest=max(*lengths, 1, chance.randint(1, LONGEST)), seed=seed)
        replayed = model(**batch).last_hidden_state
        assert model.skimming.why_eager is None
        real = batch["attention_mask"].bool()
        filled = {name: F.pad(x, (0, LONGEST - x.size(1), 0, LARGEST - x.size(0))) for name, x in batch.items()}
        eager = type(model).forward(model, **filled).last_hidden_state[: real.size(0), : real.size(1)]
        assert replayed.shape == eager.shape and torch.equal(replayed[real], eager[real]), lengths
    assert (model.skimming.graphs.captures, model.skimming.graphs.replays) == (1, 1001)


@dtypes
@on_device
@torch.inference_mode()
def test_a_replay_is_one_launch_and_waits_for_nothing(
    place: Place, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, launches = _model(place, dtype), []
    batch = inputs((65, 1, 17, 96), place.device)
    model.skimming.capture(4, LONGEST)
    replay: Callable[..., None] = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: launches.append(graph) or replay(graph))
    torch.cuda.synchronize()
    with no_waiting():
        output = model(**batch).last_hidden_state
    assert model.skimming.why_eager is None and len(launches) == 1 and output.isfinite().all()


@on_device
@torch.no_grad()
def test_the_second_forward_of_a_size_is_captured_and_its_memory_counted(place: Place) -> None:
    model, batch = _model(place, torch.bfloat16), inputs((65, 1, 17, 96), place.device)
    first = model(**batch).last_hidden_state
    second = model(**batch).last_hidden_state
    assert model.skimming.why_eager is None and len(model.skimming.graphs) == 1
    assert torch.equal(first, second)
    assert 0 < model.skimming.graphs.bytes_held <= model.skimming.graphs.max_bytes
    model.embeddings.word_embeddings.weight.mul_(1.5)
    model(**batch)
    assert len(model.skimming.graphs) == 0, "a changed weight"


@on_device
@torch.no_grad()
def test_sizes_that_share_memory(place: Place) -> None:
    """Replayed in any order: intermediates of one lie where the other has its output."""
    model, sizes = _model(place, torch.bfloat16), ((8, 96), (4, 48), (1, 7))
    for size in sizes:
        model.skimming.capture(*size)
    batches = [inputs((length,) * batch, place.device, longest=length) for batch, length in sizes]
    expected = [type(model).forward(model, **batch).last_hidden_state for batch in batches]
    chance = random.Random(0)
    for i in (chance.randrange(3) for _ in range(60)):
        assert torch.equal(model(**batches[i]).last_hidden_state, expected[i])
    assert model.skimming.graphs.captures == 3


@on_device
@torch.no_grad()
def test_streams_take_turns(place: Place) -> None:
    model = _model(place, torch.bfloat16)
    model.skimming.capture(4, LONGEST)
    batches = [inputs((5 * i + 1, 96, 1, i), place.device, seed=i) for i in range(8)]
    expected = [type(model).forward(model, **batch).last_hidden_state for batch in batches]
    torch.cuda.synchronize()
    outputs = []
    for batch in batches:
        with torch.cuda.stream(torch.cuda.Stream()):
            outputs.append(model(**batch).last_hidden_state)
    torch.cuda.synchronize()
    for batch, output, wanted in zip(batches, outputs, expected, strict=True):
        real = batch["attention_mask"].bool()
        assert torch.equal(output[real], wanted[real])
