"""The one table that says, per architecture, where the parts of a post-LayerNorm encoder live.

Adding an architecture is adding a row; nothing else in the package knows a model's attribute names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module


@dataclass(frozen=True)
class Architecture:
    """Attribute paths of one encoder; those from `query` on are relative to a layer."""

    encoder: str  # from the base model
    layers: Callable[[Any], list[nn.Module]]
    query: str
    key: str
    value: str
    out: str
    norm1: str
    ffn_in: str
    activation: str
    ffn_out: str
    norm2: str
    attention_dropout: str | None  # after the attention's output projection
    ffn_dropout: str | None  # after the FFN's output projection
    input_projection: str | None = None  # from the encoder, applied to the embeddings
    output: type = BaseModelOutput
    counts_from_padding: bool = False  # positions of tokens start behind the id of the padding
    encoder_sees_positions: bool = True  # is called with `position_ids`, which tell packed sequences apart


def _albert_layers(encoder: Any) -> list[nn.Module]:
    """Layers in order of application; ALBERT applies the same few again and again."""
    config = encoder.config
    groups = encoder.albert_layer_groups
    per_group = config.num_hidden_layers / config.num_hidden_groups
    return [layer for i in range(config.num_hidden_layers) for layer in groups[int(i / per_group)].albert_layers]


_BERT = Architecture(
    encoder="encoder",
    layers=lambda encoder: list(encoder.layer),
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    norm1="attention.output.LayerNorm",
    ffn_in="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    ffn_out="output.dense",
    norm2="output.LayerNorm",
    attention_dropout="attention.output.dropout",
    ffn_dropout="output.dropout",
    output=BaseModelOutputWithPastAndCrossAttentions,
)

_ROBERTA = replace(_BERT, counts_from_padding=True)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": Architecture(
        encoder="transformer",
        layers=lambda encoder: list(encoder.layer),
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        out="attention.out_lin",
        norm1="sa_layer_norm",
        ffn_in="ffn.lin1",
        activation="ffn.activation",
        ffn_out="ffn.lin2",
        norm2="output_layer_norm",
        attention_dropout=None,
        ffn_dropout="ffn.dropout",
        encoder_sees_positions=False,
    ),
    "albert": Architecture(
        encoder="encoder",
        layers=_albert_layers,
        query="attention.query",
        key="attention.key",
        value="attention.value",
        out="attention.dense",
        norm1="attention.LayerNorm",
        ffn_in="ffn",
        activation="activation",
        ffn_out="ffn_output",
        norm2="full_layer_layer_norm",
        attention_dropout="attention.output_dropout",
        ffn_dropout=None,
        input_projection="embedding_hidden_mapping_in",
    ),
}

# Heads that read nothing but the first token of a sequence.
_FIRST_TOKEN_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")


def architecture_of(model: Any) -> Architecture:
    """The row for `model`; ValueError if there is none, or if the model is not a plain encoder."""
    config = model.base_model.config  # a head may have another one, which the encoder does not read
    model_type = config.model_type
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"model: {type(model).__name__} is of type {model_type!r}; skimming knows {', '.join(ARCHITECTURES)}"
        )
    for flag in ("is_decoder", "add_cross_attention"):
        if getattr(config, flag, False):
            raise ValueError(f"model: config.{flag} is set; only encoders can skim")
    return ARCHITECTURES[model_type]


def layer_count(config: Any) -> int:
    """Layers that a model applies to a token: ALBERT's groups may hold several."""
    return int(config.num_hidden_layers) * int(getattr(config, "inner_group_num", 1))


def encoder_of(model: PreTrainedModel) -> Any:
    """The encoder module of `model`."""
    return get(model.base_model, architecture_of(model).encoder)


def reads_first_token_only(model: PreTrainedModel) -> bool:
    """Whether the head reads only the first token: known of the Hugging Face heads above; a custom one may read any."""
    kind = type(model)
    return kind.__module__.startswith("transformers.") and kind.__name__.endswith(_FIRST_TOKEN_HEADS)


def get(module: nn.Module, path: str) -> Any:
    """The part of `module` at a dotted path."""
    return functools.reduce(getattr, path.split("."), module)


def has_foreign_hooks(tables: Iterable[Mapping[int, Any] | None]) -> bool:
    """Whether one of these tables of hooks has any that is not Hugging Face's own.

    Those stay on layers and their attention, idle, once states of every layer were asked for; skimming calls neither.
    """
    present = (hook for table in filter(None, tables) for hook in table.values())
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in present)


def has_own_forward(module: Any) -> bool:
    """Whether a forward was set on the instance, and is not the class's, which accelerate leaves there unwrapped."""
    forward = vars(module).get("forward")
    theirs = type(module).forward
    while theirs is not None and getattr(forward, "__func__", forward) is not theirs:
        theirs = getattr(theirs, "__wrapped__", None)
    return forward is not None and theirs is None


def check_containers(layer: nn.Module, architecture: Architecture) -> None:
    """TypeError if `layer`, or a module around its parts, has a forward that is not Hugging Face's.

    Skimming calls the parts themselves, so that nothing else in such a forward would ever run.
    """
    parts = (architecture.query, architecture.out, architecture.ffn_in, architecture.ffn_out)
    paths = {path.rpartition(".")[0] for path in parts}
    paths |= {path.rpartition(".")[0] for path in paths}
    for path in sorted(paths):
        module = get(layer, path) if path else layer
        # torch's own wrappers (compiled, checkpointed) pass attributes on.
        theirs = type(module).forward.__module__.startswith(("transformers.", "torch."))
        if not theirs or has_own_forward(module):
            where = f"{path} of a layer" if path else "a layer"
            raise TypeError(
                f"model: {where} is a {type(module).__name__} with a forward of its own, which skimming would never "
                "call: it calls the layer's linear layers, norms and dropouts one by one"
            )


def is_plain_norm(module: Any) -> bool:
    """Whether a kernel may stand for calling it: PyTorch's own LayerNorm, with both parameters and no hooks."""
    return (
        type(module) is nn.LayerNorm
        and not has_own_forward(module)
        and module.weight is not None
        and module.bias is not None
        and not any(map(vars(module).get, HOOKS))
    )
