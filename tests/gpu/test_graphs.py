"""One CUDA graph of a whole forward serves every batch of its shape: it follows lengths and masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .conftest import LONGEST, ON_DEVICE, Place, dtypes, inputs, skimming_bert

pytestmark = pytest.mark.gpu
on_device = pytest.mark.parametrize("place", ON_DEVICE, ids=str)
BATCHES = ((65, 1, 17, 96), (96, 96, 96, 96), (1, 1, 1, 1), (3, 64, 2, 31), (0, 5, 0, 33), (65, 1, 17, 96))


def capture(model: PreTrainedModel, batch: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], Tensor]:
    """A function of a batch of the same shape that replays one captured forward."""
    held = {name: x.clone() for name, x in batch.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            model(**held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(**held).last_hidden_state

    def replay(batch: dict[str, Tensor]) -> Tensor:
        for name, x in batch.items():
            held[name].copy_(x)
        graph.replay()
        return output.clone()

    return replay


@dtypes
@on_device
@torch.no_grad()
def test_replays_equal_the_eager_forward(place: Place, dtype: torch.dtype) -> None:
    place.require(dtype)
    model = skimming_bert(place, dtype)
    replay = capture(model, inputs(BATCHES[0], place.device))
    for seed, lengths in enumerate(BATCHES):
        batch = inputs(lengths, place.device, seed=seed)
        replayed, eager = replay(batch), model(**batch).last_hidden_state
        real = batch["attention_mask"].bool()
        assert replayed.shape == (len(lengths), LONGEST, 128)
        assert torch.equal(replayed[real], eager[real]), lengths


@on_device
@torch.no_grad()
def test_masks_with_gaps(place: Place) -> None:
    """Tokens of a sequence need not stand together."""
    place.require(torch.bfloat16)
    model, batch = skimming_bert(place, torch.bfloat16), inputs(BATCHES[1], place.device)
    replay = capture(model, batch)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        batch["attention_mask"] = (torch.rand(batch["input_ids"].shape, generator=generator) < 0.5).long().cuda()
        real = batch["attention_mask"].bool()
        assert torch.equal(replay(batch)[real], model(**batch).last_hidden_state[real])
