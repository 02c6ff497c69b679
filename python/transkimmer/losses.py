"""The skim loss on its way from the encoder to the loss that a model is trained by.

A head's loss is raised by it where a forward makes one. Whoever computes a loss from the outputs instead adds it there:
`SkimTrainer` does, anybody else by `model.skimming.penalty`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .config import SkimConfig
from .records import current_records

# Context variables, so that threads do not mix theirs up.
_left: ContextVar[list[Tensor] | None] = ContextVar("transkimmer_left", default=None)
_unclaimed: ContextVar[tuple[list[Tensor], bool] | None] = ContextVar("transkimmer_unclaimed", default=None)


def leave_skim_loss(loss: Tensor | None, config: SkimConfig) -> None:
    """From an encoder in training, for the forward of the model that it is in."""
    if loss is None:
        return
    if (left := _left.get()) is not None:
        left.append(loss)
    else:  # a part of a model, called by itself
        _warn_of(config.penalty(loss), config)


@contextmanager
def unclaimed_penalties(*, all_of_them: bool) -> Iterator[list[Tensor]]:
    """Collects, inside the block, what forwards whose output has no loss would have added to it.

    all_of_them: it is collected, and not added, where the output has a loss, too, since nobody will look at that.
    """
    penalties: list[Tensor] = []
    token = _unclaimed.set((penalties, all_of_them))
    try:
        yield penalties
    finally:
        _unclaimed.reset(token)


def with_skim_loss(model: PreTrainedModel, run: Callable[[], Any]) -> Any:
    """A forward of `model` in training, `run()`, its loss raised; by the mean, if the encoder ran several times."""
    left: list[Tensor] = []
    token = _left.set(left)
    try:
        output = run()
    finally:
        _left.reset(token)
    if not left:
        return output
    skimming: Any = model.skimming
    penalty = skimming.config.penalty(torch.stack(left).mean())
    collected, all_of_them = _unclaimed.get() or (None, False)
    if collected is not None and all_of_them:
        collected.append(penalty)
        return output
    if isinstance(output, tuple):  # return_dict=False: the loss, a scalar, comes first where there is one
        if output and isinstance(output[0], Tensor) and output[0].dim() == 0:
            return (output[0] + penalty, *output[1:])
    elif getattr(output, "loss", None) is not None:
        output.loss = output.loss + penalty
        return output
    if collected is not None:
        collected.append(penalty)
    else:
        _warn_of(penalty, skimming.config)
    return output


def _warn_of(penalty: Tensor, config: SkimConfig) -> None:
    """If `penalty` would be wanted and is lost."""
    if penalty.requires_grad and current_records() is None and config.skim_weight > 0:
        _warn()


@functools.cache  # once
def _warn() -> None:
    warnings.warn(
        "a skimming model has made no loss in training that the skim loss could be added to, so nothing makes its "
        "predictors skim: pass labels, or record_skimming() and add model.skimming.penalty(records) to your loss",
        stacklevel=2,
    )
