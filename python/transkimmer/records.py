"""What a forward skimmed, reached without touching Hugging Face's output classes and without shared state.

with transkimmer.record_skimming() as records:
    logits = model(**inputs).logits
records[0].tokens_kept
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transkimmer_kernels.ragged import first_of_each

_records: ContextVar[list[SkimRecord] | None] = ContextVar("transkimmer_records", default=None)


@dataclass
class SkimRecord:
    """One forward of one encoder, on padded input [batch, seq] (packed input: batch = 1, seq = all tokens).

    Attributes:
        shape: (batch, seq) of the input.
        cu_seqlens: int32 [sequences + 1], offsets of the input's real tokens.
        layer_slots: per layer, int32 [capacity]: places in the flattened input that the layer worked on.
        layer_cu_seqlens: per layer, int32 [sequences + 1]; the last entry is how many of `layer_slots` are valid.
        skim_loss: in training, the mean share of real tokens that the layers worked on (Eq. 6), differentiable.
        logits: in training, per layer, the predictors' logits fp32 [real tokens], detached; in pruned training NaN at
            tokens that were removed before the layer.
    """

    shape: tuple[int, int]
    cu_seqlens: Tensor
    layer_slots: list[Tensor] = field(default_factory=list)
    layer_cu_seqlens: list[Tensor] = field(default_factory=list)
    skim_loss: Tensor | None = None
    logits: list[Tensor] = field(default_factory=list)

    @property
    def keep_masks(self) -> Tensor:
        """bool [layers, batch, seq]: which tokens each layer worked on."""
        masks = torch.zeros(len(self.layer_slots), self.shape[0] * self.shape[1] + 1, dtype=torch.bool)
        for layer, (slots, cu_seqlens) in enumerate(zip(self.layer_slots, self.layer_cu_seqlens, strict=True)):
            masks[layer, slots[: int(cu_seqlens[-1])].long().cpu()] = True
        return masks[:, :-1].view(-1, *self.shape)

    @property
    def lengths(self) -> Tensor:
        """int64 [sequences]: real tokens of each sequence."""
        return self.cu_seqlens.diff().long().cpu()

    @property
    def layer_lengths(self) -> Tensor:
        """int64 [layers, sequences]: tokens that each layer worked on."""
        return torch.stack([cu_seqlens.diff().long().cpu() for cu_seqlens in self.layer_cu_seqlens])

    @property
    def tokens_kept(self) -> Tensor:
        """fp64 [layers]: share of the real tokens that each layer worked on."""
        return self.layer_lengths.sum(1).double() / self.lengths.sum().clamp(min=1)

    @property
    def first_tokens(self) -> Tensor:
        """bool [real tokens]: the first one of each sequence, which is never scored."""
        return first_of_each(self.cu_seqlens, int(self.cu_seqlens[-1]))

    def scored_logits(self, layer: int) -> Tensor:
        """fp32 [tokens]: of those that the layer's predictor decided about: not first, and not gone by then."""
        logit = self.logits[layer]
        return logit[~(self.first_tokens | logit.isnan())]


@contextmanager
def record_skimming() -> Iterator[list[SkimRecord]]:
    """Collects a `SkimRecord` for every encoder forward inside the block, in this thread or task only."""
    records: list[SkimRecord] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def current_records() -> list[SkimRecord] | None:
    """The innermost open block's records, or None where no block is open."""
    return _records.get()
