"""Small randomly initialised models of every architecture and head, and inputs for them."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

# What a test runs that is about kernels: those that TRANSKIMMER_KERNELS names, which then serve every other test, too.
KERNELS = (os.environ["TRANSKIMMER_KERNELS"],) if "TRANSKIMMER_KERNELS" in os.environ else ("reference", "cpu")
VOCABULARY = 120
LAYERS = 3

HEADS = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "qa": AutoModelForQuestionAnswering,
    "mlm": AutoModelForMaskedLM,
    "choice": AutoModelForMultipleChoice,
}
ARCHITECTURES = ("bert", "roberta", "distilbert", "albert")
ROBERTAS = {"roberta": RobertaConfig, "xlm-roberta": XLMRobertaConfig, "camembert": CamembertConfig}


def config_of(architecture: str, **overrides: object) -> object:
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=LAYERS,
        intermediate_size=128,
        max_position_embeddings=80,
        # Wide enough that layers change their input a lot: a missing layer or a wrong mask cannot hide.
        initializer_range=overrides.pop("initializer_range", 0.15),
    )
    if architecture == "distilbert":
        names = {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
        names["intermediate_size"] = "hidden_dim"
        return DistilBertConfig(**{names.get(key, key): value for key, value in sizes.items()}, **overrides)
    if architecture in ROBERTAS:
        return ROBERTAS[architecture](**sizes, pad_token_id=1, **overrides)
    if architecture == "albert":
        own = {"embedding_size": 32, "num_hidden_groups": 1, "hidden_act": "gelu"}
        return AlbertConfig(**sizes, **own | overrides)
    return BertConfig(**sizes, **overrides)


def tiny(architecture: str, head: str | None = None, **overrides: object) -> PreTrainedModel:
    """A dense model in eval mode, the same at every call."""
    torch.manual_seed(0)
    auto = AutoModel if head is None else HEADS[head]
    return auto.from_config(config_of(architecture, **overrides)).eval()


def padded_inputs(lengths: tuple[int, ...] = (9, 1, 14, 5), side: str = "right", choices: int = 0) -> dict[str, Tensor]:
    """Random tokens and their mask; `choices` > 0 makes it [batch / choices, choices, seq]."""
    torch.manual_seed(1)
    longest = max(lengths)
    ids = torch.randint(5, VOCABULARY, (len(lengths), longest))
    place = torch.arange(longest).expand(len(lengths), -1)
    size = torch.tensor(lengths)[:, None]
    mask = (place < size if side == "right" else place >= longest - size).long()
    inputs = {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}
    if choices:
        inputs = {key: value.view(-1, choices, longest) for key, value in inputs.items()}
    return inputs


def undecided_predictors(model: PreTrainedModel) -> None:
    """Predictors whose decisions differ from token to token, about half of them skims at each layer."""
    torch.manual_seed(2)
    for predictor in model.skimming.predictors:
        torch.nn.init.normal_(predictor.fc.weight, std=0.2)
        torch.nn.init.normal_(predictor.out.weight, std=0.5)
        torch.nn.init.zeros_(predictor.out.bias)
    model.skimming.refresh()


def no_dropout(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def main_output(output: object) -> Tensor:
    """All of a model's float outputs at real tokens as one tensor [..., features]."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits if "logits" in output else output.last_hidden_state


def real_rows(x: Tensor, mask: Tensor) -> Tensor:
    """Rows at real tokens where `x` has a row per token, else all of `x`."""
    return x[mask.bool()] if x.dim() >= 3 and x.shape[:2] == mask.shape else x


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
