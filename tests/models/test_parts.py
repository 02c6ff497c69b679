"""What a model is made of: parts that skimming cannot stand for are refused, never left out in silence."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from transformers import AutoModelForSequenceClassification, BertModel, BertPreTrainedModel
from transformers.models.bert.modeling_bert import BertLayer
from transkimmer import SkimConfig, add_skimming, remove_skimming
from transkimmer.architectures import ARCHITECTURES as ARCHITECTURE_PARTS
from transkimmer.architectures import get

from .tiny import ARCHITECTURES, KERNELS, config_of, padded_inputs, relative_error, tiny, undecided_predictors

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


class Louder(BertLayer):
    """Somebody's own layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().forward(*args, **kwargs)


class OwnNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@every_architecture
@torch.no_grad()
def test_dropout_that_is_on_in_eval_mode_is_refused(architecture: str) -> None:
    rate = {"dropout" if architecture == "distilbert" else "hidden_dropout_prob": 0.1}
    model = add_skimming(tiny(architecture, "sequence", **rate)).eval()
    inputs = padded_inputs()
    expected = model(**inputs).logits
    parts = ARCHITECTURE_PARTS[architecture]
    dropout = get(parts.layers(model.skimming._encoder)[1], parts.attention_dropout or parts.ffn_dropout)
    dropout.train()
    with pytest.raises(RuntimeError, match="a dropout of the encoder is in training mode"):
        model(**inputs)
    dropout.p = 0.0
    assert torch.equal(model(**inputs).logits, expected)


@torch.no_grad()
def test_dropout_of_embeddings_that_is_on_in_eval_mode_drops() -> None:
    model = add_skimming(tiny("bert")).eval()
    model.embeddings.dropout.train()
    inputs = padded_inputs()  # seeds the generator
    first, second = (model(**inputs).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


class OwnDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


PARTS = {
    "a layer": ("", Louder, "a layer is a Louder with a forward of its own"),
    "dropout": ("output.dropout", OwnDropout, "output.dropout is a OwnDropout"),
    "norm": ("output.LayerNorm", OwnNorm, "output.LayerNorm is a OwnNorm"),
}


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_a_part_that_is_somebodys_own_is_refused(part: str) -> None:
    path, kind, message = PARTS[part]
    model = add_skimming(tiny("bert", "sequence")).eval()
    model.bert.encoder.layer[1].get_submodule(path).__class__ = kind
    with pytest.raises(TypeError, match=message):
        model(**padded_inputs())


def _prune(part: nn.Module, name: str) -> None:
    prune.l1_unstructured(part, name, 0.5)


# What torch.nn.utils has for a weight that a hook computes from others, before every call.
HOOKED = {
    "pruned weight": lambda part: _prune(part, "weight"),
    "pruned bias": lambda part: _prune(part, "bias"),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", HOOKED)
def test_weights_that_a_hook_computes_are_refused(change: str) -> None:
    """Inference calls no modules, and would go on with what the last call of the module left."""
    model = add_skimming(tiny("bert", "sequence"))
    part = model.bert.encoder.layer[1].intermediate.dense
    HOOKED[change](part)
    model.train()(**padded_inputs(), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    with torch.no_grad(), pytest.raises(TypeError, match="whose weight or bias a hook computes"):
        model.eval()(**padded_inputs())
    if change == "pruned weight":
        prune.remove(part, "weight")
        model(**padded_inputs())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_layers_are_refused() -> None:
    model = torch.ao.quantization.quantize_dynamic(add_skimming(tiny("bert", "sequence")), {nn.Linear})
    with (
        torch.no_grad(),
        pytest.raises(TypeError, match=r"is a torch\..*quantized.*Linear.*quantised layers"),
    ):
        model(**padded_inputs())


def test_a_norm_without_bias_is_refused() -> None:
    model = add_skimming(tiny("bert", "sequence"))
    model.bert.encoder.layer[1].output.LayerNorm = nn.LayerNorm(64, bias=False)
    with torch.no_grad(), pytest.raises(TypeError, match="is a LayerNorm without weight or bias"):
        model(**padded_inputs())


@pytest.mark.parametrize("path", ["attention.self.query", "output.LayerNorm", "attention"])
@torch.no_grad()
def test_a_forward_that_was_set_on_a_part_is_refused(path: str) -> None:
    model = add_skimming(tiny("bert", "sequence")).eval()
    module = model.bert.encoder.layer[1].get_submodule(path)
    module.forward = MethodType(lambda self, x, *rest: x, module)
    with pytest.raises(TypeError, match="with a forward of its own"):
        model(**padded_inputs())


@torch.no_grad()
def test_parts_that_compute_the_same_are_taken() -> None:
    """No dropout at all, the class's forward left behind by hooks, a parametrised weight, wrappers of torch."""
    model = add_skimming(tiny("bert", "sequence")).eval()
    expected = model(**padded_inputs()).logits
    layer, predictor = model.bert.encoder.layer[1], model.skimming.predictors[0]
    layer.output.dropout = nn.Identity()
    for part in (layer, layer.attention, layer.output.dense, layer.output.LayerNorm):
        part.forward = MethodType(type(part).forward, part)
    nn.utils.parametrizations.weight_norm(predictor.fc)
    model.bert.encoder.layer[2] = checkpoint_wrapper(model.bert.encoder.layer[2])
    model.skimming.refresh()
    assert relative_error(model(**padded_inputs()).logits, expected) < 1e-5


def test_a_model_that_accelerate_has_unwrapped_can_skim() -> None:
    """It leaves the innermost of a decorated forward bound to the instance."""
    model = tiny("bert", "sequence")
    forward = type(model).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    assert forward is not type(model).forward
    model.forward = MethodType(forward, model)
    add_skimming(model).eval()(**padded_inputs())


@torch.no_grad()
def test_an_adapter_in_a_predictor_is_refused() -> None:
    model = add_skimming(tiny("bert", "sequence")).eval()
    model.skimming.predictors[0].fc = nn.Sequential(model.skimming.predictors[0].fc)
    with pytest.raises(TypeError, match="fc is a Sequential"):
        model(**padded_inputs())


def test_a_layer_of_ones_own_is_refused_at_once() -> None:
    model = tiny("bert", "sequence")
    model.bert.encoder.layer[1].__class__ = Louder
    with pytest.raises(TypeError, match="a layer is a Louder"):
        add_skimming(model)
    model.bert.encoder.layer[1].__class__ = type("Renamed", (BertLayer,), {})  # only named otherwise
    add_skimming(model)


@pytest.mark.parametrize("path", ["", "bert.encoder", "bert.embeddings"])
def test_a_forward_that_was_set_on_the_instance_is_refused(path: str) -> None:
    model = tiny("bert", "sequence")
    module = model.get_submodule(path)
    module.forward = torch.no_grad()(module.forward)
    with pytest.raises(ValueError, match="has a forward that was set on the instance"):
        add_skimming(model)
    module.forward = MethodType(type(module).forward, module)  # as accelerate leaves it
    add_skimming(model)


@pytest.mark.parametrize("architecture", ["roberta", "xlm-roberta", "camembert"])
@torch.no_grad()
def test_positions_count_from_the_padding_of_the_embeddings(architecture: str) -> None:
    """And not of their table, which is replaced where a model is to read longer texts."""
    dense = tiny(architecture)
    longer = nn.Embedding(120, dense.config.hidden_size)
    longer.weight[:80] = dense.embeddings.position_embeddings.weight
    dense.embeddings.position_embeddings = longer
    expected = dense(**padded_inputs()).last_hidden_state
    model = add_skimming(copy.deepcopy(dense)).eval()
    mask = padded_inputs()["attention_mask"].bool()
    assert relative_error(model(**padded_inputs()).last_hidden_state[mask], expected[mask]) < 1e-5


@torch.no_grad()
def test_a_padding_index_of_berts_position_table_means_nothing() -> None:
    dense = tiny("bert")
    dense.embeddings.position_embeddings.padding_idx = 0
    expected = dense(**padded_inputs()).last_hidden_state
    mask = padded_inputs()["attention_mask"].bool()
    actual = add_skimming(dense).eval()(**padded_inputs()).last_hidden_state
    assert relative_error(actual[mask], expected[mask]) < 1e-5


@every_architecture
def test_models_that_shared_a_config_keep_their_own_settings(architecture: str, tmp_path: Any) -> None:
    config = config_of(architecture)
    first, second, dense = (AutoModelForSequenceClassification.from_config(config) for _ in range(3))
    add_skimming(first, SkimConfig(threshold=0.7))
    add_skimming(second, SkimConfig(threshold=0.5))
    assert dense.config._attn_implementation == "sdpa" and not hasattr(dense.config, "skimming")
    assert first.config.skimming["threshold"] == 0.7 and second.config.skimming["threshold"] == 0.5
    assert {id(m.config) for m in first.modules() if hasattr(m, "config")} == {id(first.config)}
    remove_skimming(second)
    first.save_pretrained(tmp_path)
    assert type(first.config).from_pretrained(tmp_path).skimming["threshold"] == 0.7
    first.eval()(**padded_inputs())


@every_architecture
@torch.no_grad()
def test_a_dense_model_of_a_skimming_models_config(architecture: str) -> None:
    dense, inputs = tiny(architecture, "sequence"), padded_inputs()
    expected = dense(**inputs).logits
    other = type(dense)(add_skimming(tiny(architecture, "sequence")).config).eval()
    other.load_state_dict(dense.state_dict())
    torch.testing.assert_close(other(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


class Around(BertPreTrainedModel):
    """A model whose base model has a config of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        inner = copy.deepcopy(config)
        inner.num_attention_heads = 4
        config.model_type = "ranker"
        self.bert = BertModel(inner)
        self.post_init()

    def forward(self, **inputs: Any) -> Any:
        return self.bert(**inputs)


@pytest.mark.parametrize("kernels", KERNELS)
@torch.no_grad()
def test_the_config_of_the_base_model_counts(kernels: str) -> None:
    torch.manual_seed(0)
    model = Around(config_of("bert")).eval()
    model.bert.set_attn_implementation("eager")
    mask = padded_inputs()["attention_mask"].bool()
    expected = model(**padded_inputs()).last_hidden_state[mask]
    add_skimming(model, kernels=kernels)
    assert relative_error(model(**padded_inputs()).last_hidden_state[mask], expected) < 1e-5
    model.bert.config.output_hidden_states = True
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(**padded_inputs())
    remove_skimming(model)
    assert (model.config._attn_implementation, model.bert.config._attn_implementation) == ("sdpa", "eager")


def test_cached_keys_and_causal_attention_are_refused() -> None:
    model = add_skimming(tiny("bert")).eval()
    hidden = torch.zeros(1, 3, 64)
    for given, name in (({"past_key_values": object()}, "past_key_values"), ({"is_causal": True}, "is_causal=True")):
        with pytest.raises(ValueError, match=name):
            model.encoder(hidden, **given)
    model.encoder(hidden, past_key_values=None, is_causal=False)


def test_a_copy_of_a_live_config_belongs_to_no_model() -> None:
    model = add_skimming(tiny("bert"), SkimConfig(schedule=[1.0, 0.5, 0.5]))
    for alone in (copy.copy(model.skimming.config), copy.deepcopy(model.skimming.config)):
        alone.predictor_width = 16
        alone.schedule = [1.0]
    assert model.skimming.config.schedule == [1.0, 0.5, 0.5] and model.skimming.config.predictor_width is None
    other = copy.deepcopy(model)
    other.skimming.config.threshold = 0.9
    assert other.config.skimming["threshold"] == 0.9 and model.config.skimming["threshold"] == 0.5
    with pytest.raises(ValueError, match="schedule: has 1 ratios"):
        other.skimming.config.schedule = [1.0]


@torch.no_grad()
def test_cudas_autocast_returns_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """ALBERT's encoder is given 16 bits there, and the dense one ends with a LayerNorm in fp32."""
    model = add_skimming(tiny("albert")).eval()
    undecided_predictors(model)
    assert model.encoder(torch.randn(1, 3, 32)).last_hidden_state.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encoder(torch.randn(1, 3, 32)).last_hidden_state.dtype == torch.bfloat16
        monkeypatch.setattr("transkimmer.encoder._NORMS_IN_FP32", ("cpu",))
        assert model.encoder(torch.randn(1, 3, 32)).last_hidden_state.dtype == torch.float32
