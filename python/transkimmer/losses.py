"""The skim loss on its way from the encoder to the loss that a model is trained by.

If the model's forward returns a loss, the penalty is added to it. If the loss is computed outside, the caller adds the
penalty: `SkimTrainer` does, other code calls `model.skimming.penalty`.
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
_reported: ContextVar[list[Tensor] | None] = ContextVar("transkimmer_reported", default=None)
_unclaimed: ContextVar[tuple[list[Tensor], bool] | None] = ContextVar("transkimmer_unclaimed", default=None)


def report_skim_loss(loss: Tensor | None, config: SkimConfig) -> None:
    """Called by an encoder in training; the forward of the model around it takes the loss over."""
    if loss is None:
        return
    if (reported := _reported.get()) is not None:
        reported.append(loss)
    else:  # a part of a model, called by itself
        _warn_of(config.penalty(loss), config)


@contextmanager
def unclaimed_penalties(*, all_of_them: bool) -> Iterator[list[Tensor]]:
    """Collects, inside the block, the penalties of forwards whose output has no loss.

    all_of_them: also of those whose output has one, to which the penalty is then not added: the caller ignores it.
    """
    penalties: list[Tensor] = []
    token = _unclaimed.set((penalties, all_of_them))
    try:
        yield penalties
    finally:
        _unclaimed.reset(token)


def with_skim_loss(model: PreTrainedModel, run: Callable[[], Any]) -> Any:
    """A training forward of `model`, `run()`, with the penalty added to its loss; several encoder calls: the mean."""
    losses: list[Tensor] = []
    token = _reported.set(losses)
    try:
        output = run()
    finally:
        _reported.reset(token)
    if not losses:
        return output
    skimming: Any = model.skimming
    penalty = skimming.config.penalty(torch.stack(losses).mean())
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
    """Warns once if `penalty` is lost although training needs it."""
    if penalty.requires_grad and current_records() is None and config.skim_weight > 0:
        _warn()


@functools.cache  # once
def _warn() -> None:
    warnings.warn(
        "a skimming model has made no loss in training that the skim loss could be added to, so nothing makes its "
        "predictors skim: pass labels, or record_skimming() and add model.skimming.penalty(records) to your loss",
        stacklevel=2,
    )
