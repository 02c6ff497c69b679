"""A complete inference forward never waits for the device: PyTorch is told to raise where it would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from .conftest import ON_DEVICE, Place, dtypes, inputs, skimming_bert

pytestmark = pytest.mark.gpu
on_device = pytest.mark.parametrize("place", ON_DEVICE, ids=str)


@contextmanager
def no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dtypes
@on_device
@torch.no_grad()
def test_a_forward_waits_for_nothing(place: Place, dtype: torch.dtype) -> None:
    """Embeddings and all; once before, because preparing weights and compiling may wait."""
    place.require(dtype)
    model, batch = skimming_bert(place, dtype), inputs((65, 1, 17, 96), place.device)
    expected = model(**batch).last_hidden_state
    torch.cuda.synchronize()
    with no_waiting():
        actual = model(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    assert torch.equal(actual[real], expected[real])


def test_waiting_would_be_noticed() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    x = torch.ones(1, device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        x.item()
