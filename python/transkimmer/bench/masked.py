"""Skimming by masks alone: padded, every layer on every token, in plain PyTorch, by no kernel of ours.

Twice of use: with the decisions of a run, as the reference of its answers; and in training, as the published code does
it, to be timed against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from transkimmer_kernels import choose_rows

from ..architectures import Architecture, architecture_of, encoder_of, get
from ..policies import logistic_noise
from .swap import swap_encoder


class MaskedReference:
    """The dense model with decisions given from outside: skimmed tokens are no keys, and keep the state they had.

    Args:
        dense: a dense model; it is changed.
    """

    def __init__(self, dense: PreTrainedModel) -> None:
        self._layers = _Layers(dense)
        self._keep: Tensor | None = None
        self._model = swap_encoder(dense, self._encode)

    def __call__(self, inputs: dict[str, Tensor], keep_masks: Tensor) -> Tensor:
        """Logits with `keep_masks` (bool [layers, batch, seq]) saying which tokens each layer works on."""
        self._keep = keep_masks.to(inputs["input_ids"].device)
        return self._model(**inputs).logits

    def _encode(self, hidden: Tensor, mask: Tensor) -> Tensor:
        assert self._keep is not None
        for layer, keep in zip(self._layers, self._keep, strict=True):
            output = self._layers.run(layer, hidden, keep[:, None, None, :])
            hidden = torch.where(keep.unsqueeze(-1), output, hidden)
        return hidden


class PublishedTraining:
    """Training as the published code does it: skimmed tokens are computed on, their attention multiplied by zero.

    The multiplication is done on the values, P (m V) = (P m) V, so that PyTorch's fused attention serves: the fastest
    form that leaves the semantics alone.

    Args:
        dense: a dense model; it is changed and gains the predictors as its submodule `skim_predictors`.
        predictors: one per layer.
        temperature: of the Gumbel softmax.
    """

    def __init__(self, dense: PreTrainedModel, predictors: nn.ModuleList, temperature: float) -> None:
        self._layers = _Layers(dense)
        self._temperature = temperature
        self.model = swap_encoder(dense, self._encode)
        self.model.skim_predictors = predictors
        self.skim_loss: Tensor | None = None

    def _encode(self, hidden: Tensor, mask: Tensor) -> Tensor:
        keep = mask.float()
        final, kept = hidden, []
        for layer, predictor in zip(self._layers, self.model.skim_predictors, strict=True):  # type: ignore[arg-type]
            logit = predictor(hidden)  # [batch, seq]
            noisy = logit + logistic_noise(logit)
            soft = torch.sigmoid(noisy / self._temperature)
            decided = (noisy > 0).float() + (soft - soft.detach())
            keep = keep * torch.cat([torch.ones_like(decided[:, :1]), decided[:, 1:]], 1)  # the first is never scored
            hidden = self._layers.run(layer, hidden, mask[:, None, None, :], values_times=keep)
            rows = (x.flatten(0, 1) for x in (keep, hidden, final))
            final = choose_rows(*rows, kernels="reference").view_as(hidden)
            kept.append(keep.sum() / mask.sum())
        self.skim_loss = torch.stack(kept).mean()
        return final


class _Layers(Sequence[nn.Module]):
    """The post-LayerNorm layers of a model, and what one of them computes on padded states."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._architecture: Architecture = architecture_of(model)
        self._layers = self._architecture.layers(encoder_of(model))
        self._heads: int = model.config.num_attention_heads

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: int) -> nn.Module:  # type: ignore[override]
        return self._layers[index]

    def run(self, layer: nn.Module, hidden: Tensor, mask: Tensor, *, values_times: Tensor | None = None) -> Tensor:
        """hidden [batch, seq, d]; mask: bool, broadcast to [batch, heads, seq, seq]; values_times: [batch, seq]."""
        a = self._architecture
        batch, length, width = hidden.shape
        q, k, v = (
            get(layer, path)(hidden).view(batch, length, self._heads, -1).transpose(1, 2)
            for path in (a.query, a.key, a.value)
        )
        if values_times is not None:
            v = v * values_times.to(v.dtype)[:, None, :, None]
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(batch, length, width)
        x = get(layer, a.norm1)(_drop(layer, a.attention_dropout, get(layer, a.out)(context)) + hidden)
        y = get(layer, a.ffn_out)(get(layer, a.activation)(get(layer, a.ffn_in)(x)))
        return get(layer, a.norm2)(_drop(layer, a.ffn_dropout, y) + x)


def _drop(layer: nn.Module, path: str | None, x: Tensor) -> Tensor:
    return x if path is None else get(layer, path)(x)
