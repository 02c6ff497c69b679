"""A small skimming BERT on the device, once per choice of kernels; on a CPU where a test can run there, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedModel
from transkimmer import add_skimming

from transkimmer_kernels import BackendUnavailable, kernel_set

from ..models.tiny import undecided_predictors
from ..target import skip

DTYPES = (torch.float32, torch.bfloat16)
VOCABULARY, LONGEST = 200, 96


@dataclass(frozen=True)
class Place:
    """A choice of kernels on a kind of device."""

    kernels: str
    device: str

    def __str__(self) -> str:
        return f"{self.kernels}_{self.device}"

    def require(self, dtype: torch.dtype) -> None:
        """Skips, with the reason, where these kernels cannot run all of a model."""
        if self.device == "cuda" and not torch.cuda.is_available():
            skip(self.kernels, "torch sees no CUDA device")
        try:
            kernel_set(self.kernels, self.device, dtype)
        except BackendUnavailable as error:
            skip(self.kernels, str(error))


ON_DEVICE = [Place("triton", "cuda"), Place("cuda", "cuda")]
# What a test shows on a CPU is that it would notice: the same code, on kernels that are known to be right.
EVERYWHERE = [*ON_DEVICE, Place("reference", "cpu")]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def small_bert(dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A dense encoder with the head size of BERT, the same at every call; no dropout."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_attention_heads=2,
        num_hidden_layers=4,
        intermediate_size=256,
        max_position_embeddings=LONGEST,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # Wide enough that layers change their input a lot: a missing layer or a wrong mask cannot hide.
        initializer_range=0.15,
    )
    return BertModel(config, add_pooling_layer=False).to(device, dtype).eval()


def skimming_bert(place: Place, dtype: torch.dtype) -> PreTrainedModel:
    """One that skims about half of the tokens in each layer, and captures no graphs until it is told to."""
    model = add_skimming(small_bert(torch.float32, "cpu"), kernels="reference")
    undecided_predictors(model)
    model = model.to(place.device, dtype)
    model.skimming.kernels = place.kernels
    model.skimming.cuda_graphs = "off"
    return model


def inputs(lengths: tuple[int, ...], device: str, longest: int = LONGEST, seed: int = 1) -> dict[str, Any]:
    """Random tokens, padded on the right to `longest`."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, VOCABULARY, mask.shape, generator=generator) * mask
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
