"""The embeddings of a skimming model: one kernel, in inference, instead of half a dozen operators.

Like the encoder, an existing instance is switched to another class, weights and all. Whatever the kernel does not know
(training, autocast, a table that an adapter or a quantiser has replaced) is left to Hugging Face's.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from transkimmer_kernels import kernel_set

from .architectures import is_plain_norm
from .encoder import original_class

_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


class SkimmingEmbeddings(nn.Module):
    """Mixed into a Hugging Face embeddings class; `skimming_class` makes the combination.

    Attributes set by `add_skimming`:
        skim_encoder: (the encoder,), whose choice of kernels also holds here; in a tuple: no submodule.
    """

    skim_encoder: tuple[Any]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.training and not torch.is_grad_enabled():
            kind: Any = type(self)
            out = _fused(self, {**dict(zip(_parameters(kind), args, strict=False)), **kwargs})
            if out is not None:
                return out
        return super().forward(*args, **kwargs)


@functools.cache
def _parameters(kind: Any) -> list[str]:
    """Names of the parameters of the forward that is overridden."""
    return list(inspect.signature(original_class(kind).forward).parameters)[1:]


def _fused(embeddings: Any, given: dict[str, Any]) -> Tensor | None:
    """What Hugging Face's forward returns for these arguments, by `embed_tokens`; None where that is not for them."""
    ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
    placed, types = given.pop("position_ids", None), given.pop("token_type_ids", None)
    if (ids is None) == (embeds is None) or any(isinstance(x, Tensor) or x for x in given.values()):
        return None
    tables: list[Any] = [embeddings._modules.get(name) for name in _TABLES]
    norm: Any = embeddings._modules.get("LayerNorm")
    if not _are_plain([table for table in tables if table is not None], norm) or None in tables[:2]:
        return None
    dropout = embeddings._modules.get("dropout")
    if type(dropout) is not nn.Dropout or dropout.training or dropout._forward_hooks or dropout._forward_pre_hooks:
        return None
    word, position = tables[0].weight, tables[1].weight
    kind = None if tables[2] is None else tables[2].weight
    kernels = kernel_set(embeddings.skim_encoder[0].skim_kernels, word.device.type, word.dtype)
    if kernels.serves["embed_tokens"] == "reference":  # PyTorch's operators, as Hugging Face's are
        return None
    shape = ids.shape if embeds is None else embeds.shape[:-1]
    if len(shape) != 2 or torch.is_autocast_enabled(word.device.type) or (types is not None and kind is None):
        return None
    padding = vars(embeddings).get("padding_idx")
    if placed is None and padding is not None:  # RoBERTa counts from behind its padding, and real tokens only
        placed = (
            embeddings.create_position_ids_from_input_ids(ids, padding)
            if embeds is None
            else embeddings.create_position_ids_from_inputs_embeds(embeds, padding)
        )
    if embeds is not None:  # a table in which every token has a row of its own
        ids, word = torch.arange(shape.numel(), device=embeds.device).view(shape), embeds.flatten(0, 1)
    weights = [weight for weight in (word, position, kind, norm.weight, norm.bias) if weight is not None]
    if len({(weight.dtype, weight.device) for weight in weights}) > 1 or word.size(1) != position.size(1):
        return None
    if placed is None and shape[1] > position.size(0):
        return None
    # What does not fit is refused there, in Hugging Face's words.
    if not all(_fits(x, shape, word.device) for x in (ids, placed, types) if x is not None):
        return None
    return kernels.embed_tokens(ids, placed, types, word, position, kind, norm.weight, norm.bias, norm.eps)


def _are_plain(tables: list[Any], norm: Any) -> bool:
    """Whether these are PyTorch's own modules, without hooks."""
    return (
        all(type(table) is nn.Embedding and table.max_norm is None for table in tables)
        and is_plain_norm(norm)
        and not any(table._forward_hooks or table._forward_pre_hooks for table in tables)
    )


def _fits(x: Tensor, shape: torch.Size, device: torch.device) -> bool:
    """Whether these are ids of a batch of this shape, or of one row that serves all of it."""
    return x.dtype in (torch.int64, torch.int32) and x.device == device and x.shape in (shape, (1, shape[1]))
