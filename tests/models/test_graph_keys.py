"""Which graph serves a forward, and when there is none: sizes, all else that a graph depends on, and configs."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transkimmer import add_skimming

from .test_graphs import assert_replayed, eager, skimming, tapes
from .tiny import padded_inputs, tiny

__all__ = ["tapes"]  # a fixture

pytestmark = pytest.mark.default_kernels("is about what stands around the kernels, and too long for an interpreter")


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
@torch.no_grad()
def test_sizes_end_where_positions_do(architecture: str, tapes: None) -> None:
    """80 positions; RoBERTa's first two are not for tokens."""
    model = skimming(architecture, "token")
    longest = 78 if architecture == "roberta" else 80
    for with_embeddings in (False, True):
        inputs = padded_inputs((longest - 1, 60))
        if with_embeddings:
            inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        model(**inputs)
        assert_replayed(model, inputs)
    with pytest.raises(ValueError, match=f"sequence_length=81: the model has positions for {longest} tokens"):
        model.skimming.capture(1, 81)


@torch.no_grad()
def test_the_second_use_of_a_size_is_captured(tapes: None) -> None:
    model = skimming()
    model(**padded_inputs((14, 3, 3)))
    assert "the first forward of its size" in model.skimming.why_eager
    assert_replayed(model, padded_inputs((13, 5, 1)))  # both are rounded up to 14 tokens
    for lengths in ((9, 2, 1), (14, 3)):
        model(**padded_inputs(lengths))
        assert "the first forward of its size" in model.skimming.why_eager
    assert len(model.skimming.graphs) == 1 and model.skimming.graphs.bytes_held > 0


@torch.no_grad()
def test_the_smallest_size_asked_for_serves(tapes: None) -> None:
    model = skimming()
    model.skimming.capture(8, 40)
    model.skimming.capture(2, 16, inputs=("input_ids",))
    assert model.skimming.graphs.captures == 2
    large, small = (8, 40), (2, 16)
    for lengths, size in (((5, 3), small), ((40,), large), ((17, 3), large), ((16,), small), ((1,) * 8, large)):
        assert_replayed(model, padded_inputs(lengths))
        assert next(reversed(model.skimming.graphs._held))[0] == size, "the graph used last"
    assert model.skimming.graphs.captures == 2
    model(**padded_inputs((41,)))
    assert model.skimming.why_eager is not None


@torch.no_grad()
def test_arguments_of_capture(tapes: None) -> None:
    model = skimming()
    for arguments, message in (
        ({"batch_size": 0, "sequence_length": 4}, "batch_size=0: must be at least 1"),
        ({"batch_size": 1, "sequence_length": -1}, "sequence_length=-1: must be at least 1"),
        ({"batch_size": 1, "sequence_length": 4, "inputs": ("labels",)}, r"inputs: \['labels'\] cannot be captured"),
    ):
        with pytest.raises(ValueError, match=message):
            model.skimming.capture(**arguments)
    with pytest.raises(ValueError, match="cuda_graphs='on': must be one of auto, off"):
        model.skimming.cuda_graphs = "on"
    with pytest.raises(RuntimeError, match="not now: there must be either input_ids or inputs_embeds"):
        model.skimming.capture(1, 4, inputs=("attention_mask",))
    model.skimming.graphs.max_bytes = 1000
    with pytest.raises(RuntimeError, match="max_bytes=1000"):
        model.skimming.capture(1, 4)
    model.train()
    with pytest.raises(RuntimeError, match="not now: the model is in training mode"):
        model.skimming.capture(1, 4)
    assert model.forward.sizes == []


def _change_head(model: PreTrainedModel) -> None:
    model.classifier = torch.nn.Linear(64, 2).eval()


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "weight": lambda m: m.bert.encoder.layer[1].output.dense.weight.mul_(1.5),
    "predictor": lambda m: m.skimming.predictors[0].out.bias[0].add_(0.5),
    "embedding": lambda m: m.bert.embeddings.word_embeddings.weight.mul_(1.1),
    "head": _change_head,
    "behind the counter": lambda m: (m.bert.encoder.layer[1].output.dense.weight.data.mul_(1.5), m.skimming.refresh()),
    "loading": lambda m: m.load_state_dict({k: v * 1.01 for k, v in m.state_dict().items()}),
    "dtype": lambda m: m.to(torch.bfloat16),
    "training": lambda m: m.train().eval(),
    "threshold": lambda m: setattr(m.skimming.config, "threshold", 0.6),
    "sample": lambda m: setattr(m.skimming.config, "decision", "sample"),
    "schedule": lambda m: setattr(m.skimming.config, "schedule", [1.0, 0.6, 0.3]),
    "enabled": lambda m: setattr(m.skimming, "enabled", False),
    "kernels": lambda m: setattr(m.skimming, "kernels", "reference"),
    "first token only": lambda m: setattr(m.skimming, "first_token_only", False),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_changes_are_seen(name: str, tapes: None) -> None:
    """On a size that was asked for: it is captured again at its next use."""
    model, inputs = skimming(), padded_inputs()
    model.skimming.capture(4, 16)
    assert_replayed(model, inputs)
    CHANGES[name](model)
    if name == "sample":
        draws = torch.stack([model(**inputs).logits for _ in range(8)])
        assert draws.unique(dim=0).size(0) > 1, "every replay draws anew"
    elif name == "dtype":
        actual, expected = model(**inputs).logits, eager(model, inputs).logits
        torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    else:
        assert_replayed(model, inputs)
    assert model.skimming.why_eager is None and model.skimming.graphs.captures == 2


@torch.no_grad()
def test_embeddings_of_another_dtype_have_a_graph_of_their_own(tapes: None) -> None:
    model, inputs = skimming(), padded_inputs()
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        given = {"inputs_embeds": embeds.to(dtype), **inputs}
        model(**given)
        assert_replayed(model, given)
    assert model.skimming.graphs.captures == 2


@torch.no_grad()
def test_numbers_of_choices_have_graphs_of_their_own(tapes: None) -> None:
    model = skimming("bert", "choice")
    for choices in (2, 3):
        model.skimming.capture(3, 16, num_choices=choices)
    for choices in (2, 3, 2):
        assert_replayed(model, padded_inputs((9, 1, 14, 5, 3, 8), choices=choices))
    assert model.skimming.graphs.captures == 2


@pytest.mark.parametrize("whose", ["model", "encoder"])
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("return_dict", False, "config.return_dict is off"),
        ("output_hidden_states", True, "config.output_hidden_states is set"),
    ],
)
@torch.no_grad()
def test_a_config_that_asks_for_something_else_after_a_capture(
    whose: str, name: str, value: bool, reason: str, tapes: None
) -> None:
    """The encoder's may be another than the model's."""
    model, inputs = skimming(), padded_inputs()
    model.base_model.config = model.base_model.encoder.skim_model_config = copy.deepcopy(model.config)
    config = model.config if whose == "model" else model.base_model.config
    model.skimming.capture(4, 16)
    setattr(config, name, value)
    refused = whose == "encoder" and value  # there are no states of every layer
    with pytest.raises(ValueError, match=name) if refused else contextlib.nullcontext():
        model(**inputs)
    assert model.skimming.why_eager == reason
    setattr(config, name, not value)
    assert_replayed(model, inputs)


@torch.no_grad()
def test_what_cannot_be_captured_runs_eagerly_with_a_warning(tapes: None) -> None:
    """An activation that has no kernel is composed of operators here, whose host code on a CPU reads the count."""
    model = add_skimming(tiny("bert", "sequence", hidden_act="gelu_new"), kernels="reference")
    inputs = padded_inputs()
    expected = model(**inputs).logits
    with pytest.warns(UserWarning, match=r"BertForSequenceClassification runs without a CUDA graph: .* reads from"):
        assert torch.equal(model(**inputs).logits, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a second attempt would warn again
        assert torch.equal(model(**inputs).logits, expected)
    assert "capturing failed: RuntimeError" in model.skimming.why_eager


@torch.no_grad()
def test_a_capture_is_tried_again_once_graphs_were_off(tapes: None) -> None:
    model, inputs = skimming(), padded_inputs()
    model.skimming.graphs.max_bytes = 1000
    model(**inputs)
    with pytest.warns(UserWarning, match="max_bytes=1000"):
        model(**inputs)
    model.skimming.graphs.max_bytes = 2 << 30
    model.skimming.cuda_graphs = "off"
    model.skimming.cuda_graphs = "auto"
    model(**inputs)
    assert_replayed(model, inputs)


@torch.no_grad()
def test_an_output_that_is_not_per_sequence_is_named(tapes: None) -> None:
    model = tiny("bert", "sequence")

    class Own(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output["prototypes"] = self.classifier.weight * 1.0  # [2, d]
            return output

    model.__class__ = Own
    with pytest.raises(TypeError, match="the output prototypes is no tensor with an entry per sequence"):
        add_skimming(model).skimming.capture(4, 16)
