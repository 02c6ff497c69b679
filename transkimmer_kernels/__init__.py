"""Kernels for encoders that drop tokens from layer to layer: ragged batches, no padding, no host synchronisation.

Knows tensors and nothing of Hugging Face. `python -m transkimmer_kernels.env` reports what is available here.
"""

from . import native
from .ops import (
    add_norm,
    choose_rows,
    compact,
    embed_tokens,
    encoder_layer_,
    gather_rows,
    ragged_attention,
    ragged_linear,
    ragged_linear_norm,
    ragged_linear_norm_,
    scatter_rows,
    skim_logit,
    skim_tokens,
)
from .ragged import Ragged
from .registry import KERNELS, BackendUnavailable, KernelSet, kernel_set

native.load()

__all__ = [
    "KERNELS",
    "BackendUnavailable",
    "KernelSet",
    "Ragged",
    "add_norm",
    "choose_rows",
    "compact",
    "embed_tokens",
    "encoder_layer_",
    "gather_rows",
    "kernel_set",
    "ragged_attention",
    "ragged_linear",
    "ragged_linear_norm",
    "ragged_linear_norm_",
    "scatter_rows",
    "skim_logit",
    "skim_tokens",
]
