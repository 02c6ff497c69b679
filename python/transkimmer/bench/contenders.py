"""The ways of running one model that are timed against each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from transkimmer_kernels.runtime import GraphCache

from ..architectures import architecture_of, encoder_of
from ..outputs import logits_in
from ..skimming import remove_skimming, skimming_of
from .plain import PackedEncoder
from .swap import swap_encoder

PADDED = "dense, padded (Hugging Face SDPA)"
PLAIN = "dense, padding-free (plain PyTorch)"
KEEP_ALL = "dense, padding-free (ours)"
SKIMMING = "skimming"


@dataclass
class Contender:
    """name: as printed; run: padded inputs -> logits [batch, ...]; graphs: where it captures, None if nowhere."""

    name: str
    run: Callable[[dict[str, Tensor]], Tensor]
    graphs: GraphCache | None = None


def contenders(model: PreTrainedModel) -> list[Contender]:
    """Dense padded, dense padding-free (plain PyTorch, and ours) and skimming; all with `model`'s weights.

    The last two are one model, switched, and have their graphs in common.
    """
    padded = remove_skimming(copy.deepcopy(model))
    padded.set_attn_implementation("sdpa")
    plain = use_plain_packed(copy.deepcopy(padded))

    def ours(enabled: bool) -> Callable[[dict[str, Tensor]], Tensor]:
        def run(inputs: dict[str, Tensor]) -> Tensor:
            skimming_of(model).enabled = enabled
            return logits_in(model(**inputs))

        return run

    return [
        Contender(PADDED, lambda inputs: logits_in(padded(**inputs))),
        Contender(PLAIN, lambda inputs: logits_in(plain(**inputs))),
        Contender(KEEP_ALL, ours(False), skimming_of(model).graphs),
        Contender(SKIMMING, ours(True), skimming_of(model).graphs),
    ]


def use_plain_packed(model: PreTrainedModel) -> PreTrainedModel:
    """Swaps a dense model's encoder for `PackedEncoder` between unpadding and padding."""
    architecture = architecture_of(model)
    layers = architecture.layers(encoder_of(model))
    packed = PackedEncoder(layers, architecture, model.config.num_attention_heads)

    def encode(hidden: Tensor, rows: Tensor) -> Tensor:
        output = hidden.new_zeros(hidden.shape)
        output[rows] = packed(hidden[rows], rows.sum(1).tolist())
        return output

    return swap_encoder(model, encode)
