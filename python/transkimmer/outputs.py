"""The logits in a head's output, whatever the head, and the states that the head reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architectures import encoder_of


def logits_in(output: Any) -> Tensor:
    """[batch, classes], or of a question-answering head [batch, 2, seq]: where an answer starts and where it ends.

    The last dimension is what a softmax goes over.
    """
    if "logits" in output:
        return output.logits
    return torch.stack([output.start_logits, output.end_logits], 1)


def in_order(parts: Sequence[Tensor]) -> list[Tensor]:
    """What replicas under `nn.DataParallel` return, by device, as their outputs are put together."""
    return sorted(parts, key=lambda part: part.device.index or 0)


@contextmanager
def final_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects what the encoder of `model`, dense or skimming, returns to its head: [batch, seq, d] per forward.

    Under `nn.DataParallel` that is one per replica (`in_order`).
    """
    states: list[Tensor] = []

    def see(encoder: nn.Module, args: Any, output: Any) -> None:
        states.append(output[0])

    skimming: Any = getattr(model, "skimming", None)  # through wrappers, an adapter's for one
    encoder = encoder_of(model) if skimming is None else skimming._encoder
    handle = encoder.register_forward_hook(see)
    try:
        yield states
    finally:
        handle.remove()
