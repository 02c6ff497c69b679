"""The ways of running one model that are timed against each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures import architecture_of, encoder_of, get
from ..encoder import ATTENTION_NAME
from ..skimming import remove_skimming, skimming_of
from .plain import PackedEncoder

PADDED = "dense, padded (Hugging Face SDPA)"
PLAIN = "dense, padding-free (plain PyTorch)"
KEEP_ALL = "dense, padding-free (ours)"
SKIMMING = "skimming"


@dataclass
class Contender:
    """name: as printed; run: padded inputs -> logits [batch, ...]."""

    name: str
    run: Callable[[dict[str, Tensor]], Tensor]


def contenders(model: PreTrainedModel) -> list[Contender]:
    """Dense padded, dense padding-free (plain PyTorch, and ours) and skimming; all with `model`'s weights."""
    padded = remove_skimming(copy.deepcopy(model))
    padded.set_attn_implementation("sdpa")
    plain = copy.deepcopy(padded)
    _use_plain_packed(plain)

    def ours(enabled: bool) -> Callable[[dict[str, Tensor]], Tensor]:
        def run(inputs: dict[str, Tensor]) -> Tensor:
            skimming_of(model).enabled = enabled
            return model(**inputs).logits

        return run

    return [
        Contender(PADDED, lambda inputs: padded(**inputs).logits),
        Contender(PLAIN, lambda inputs: plain(**inputs).logits),
        Contender(KEEP_ALL, ours(False)),
        Contender(SKIMMING, ours(True)),
    ]


def _use_plain_packed(model: PreTrainedModel) -> None:
    """Swaps a dense model's encoder for `PackedEncoder` between unpadding and padding."""
    architecture = architecture_of(model)
    encoder = encoder_of(model)
    owner, _, name = architecture.encoder.rpartition(".")
    setattr(get(model.base_model, owner) if owner else model.base_model, name, _PlainEncoder(encoder, model))
    model.set_attn_implementation(ATTENTION_NAME)  # hands the encoder the 2-D mask


class _PlainEncoder(nn.Module):
    def __init__(self, encoder: nn.Module, model: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.architecture = architecture_of(model)
        layers = self.architecture.layers(encoder)
        self.packed = PackedEncoder(layers, self.architecture, model.config.num_attention_heads)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if self.architecture.input_projection is not None:
            hidden_states = get(self.encoder, self.architecture.input_projection)(hidden_states)
        if attention_mask is None:
            attention_mask = hidden_states.new_ones(hidden_states.shape[:2]).bool()
        rows = attention_mask.bool()
        output = hidden_states.new_zeros(hidden_states.shape)
        output[rows] = self.packed(hidden_states[rows], rows.sum(1).tolist())
        return self.architecture.output(last_hidden_state=output)
