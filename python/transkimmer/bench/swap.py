"""A dense Hugging Face model with another encoder in the place of its own: embeddings and head stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures import Architecture, architecture_of, encoder_of, get
from ..encoder import ATTENTION_NAME

# (hidden [batch, seq, d], mask bool [batch, seq], true at real tokens) -> [batch, seq, d].
Encode = Callable[[Tensor, Tensor], Tensor]


def swap_encoder(model: PreTrainedModel, encode: Encode) -> PreTrainedModel:
    """Lets `model`, which is changed and returned, run `encode` on its embeddings; it keeps its parameters."""
    architecture = architecture_of(model)
    owner, _, name = architecture.encoder.rpartition(".")
    swapped = _SwappedEncoder(encoder_of(model), architecture, encode)
    setattr(get(model.base_model, owner) if owner else model.base_model, name, swapped)
    model.set_attn_implementation(ATTENTION_NAME)  # hands the encoder the 2-D mask
    return model


class _SwappedEncoder(nn.Module):
    def __init__(self, encoder: nn.Module, architecture: Architecture, encode: Encode) -> None:
        super().__init__()
        self.encoder = encoder  # keeps the parameters in the model
        self.architecture = architecture
        self.encode = encode

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        if self.architecture.input_projection is not None:
            hidden_states = get(self.encoder, self.architecture.input_projection)(hidden_states)
        if attention_mask is None:
            attention_mask = hidden_states.new_ones(hidden_states.shape[:2])
        return self.architecture.output(last_hidden_state=self.encode(hidden_states, attention_mask.bool()))
