"""Weights that change, switching kernels, pipelines, threads, and refusals."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    pipeline,
)
from transkimmer import SkimConfig, add_skimming, record_skimming, remove_skimming
from transkimmer.weights import Watch

from transkimmer_kernels import BackendUnavailable
from transkimmer_kernels.triton_support import interpreted

from .tiny import ARCHITECTURES, KERNELS, config_of, padded_inputs, tiny, undecided_predictors

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@torch.no_grad()
def test_weights_are_prepared_anew_when_they_change() -> None:
    model = add_skimming(tiny("bert", "sequence"))
    inputs = padded_inputs()
    before = model(**inputs).logits
    model.base_model.encoder.layer[1].output.dense.weight.mul_(1.5)
    changed = model(**inputs).logits
    assert not torch.equal(changed, before)
    assert torch.allclose(changed, remove_skimming(model)(**inputs).logits, atol=1e-5)


@torch.no_grad()
def test_weights_are_kept_where_nothing_changes() -> None:
    model = add_skimming(tiny("bert", "sequence")).eval()
    model(**padded_inputs())
    kept = model.bert.encoder.skim_weights.held
    model.eval()(**padded_inputs())
    assert kept is not None and model.bert.encoder.skim_weights.held is kept
    model.train().eval()
    assert model.bert.encoder.skim_weights.held is None


@torch.inference_mode()
def test_what_is_loaded_into_inference_tensors_is_seen() -> None:
    """They have no counter of versions."""
    model, other = (add_skimming(tiny("bert", "sequence")).eval() for _ in range(2))
    other.bert.encoder.layer[0].output.dense.weight.mul_(2)
    expected = other(**padded_inputs()).logits
    assert not torch.equal(model(**padded_inputs()).logits, expected)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(**padded_inputs()).logits, expected)


def test_a_replica_has_prepared_weights_of_its_own() -> None:
    """Under `nn.DataParallel` it lies on another device."""
    encoder = add_skimming(tiny("bert")).encoder
    assert encoder._replicate_for_data_parallel().skim_weights is not encoder.skim_weights


@torch.no_grad()
def test_a_copy_of_weights_goes_with_them() -> None:
    model = add_skimming(tiny("bert", "sequence"))
    encoder: Any = model.base_model.encoder
    model(**padded_inputs())
    prepared = encoder.skim_weights.held
    assert model.to("cpu") is model and encoder.skim_weights.held is prepared is not None
    place = weakref.ref(encoder.layer[0].output.dense.weight.untyped_storage())
    del prepared
    model.bfloat16()
    assert encoder.skim_weights.held is None and place() is None


def test_nothing_new_lies_where_a_watched_parameter_did() -> None:
    """A second `param.data = ...` would otherwise find the address that the first one left, and look like no change."""
    layer = torch.nn.Linear(8, 8)
    watch = Watch(layer)
    place = layer.weight.data_ptr()
    layer.weight.data = layer.weight.data.clone()
    assert all(x.data_ptr() != place for x in [torch.empty(8, 8) for _ in range(200)])
    assert watch.moved()


def _add(block: Any) -> None:
    block[1].extra = block[0]


def _add_at_the_end(block: Any) -> None:
    block[2].register_buffer("extra", torch.zeros(1))


def _exchange(block: Any) -> None:
    block[0].weight, block[1].weight = block[1].weight, block[0].weight


def _drop_the_last(block: Any) -> None:
    del block[2]._buffers["last"]


@pytest.mark.parametrize("change", [_add, _add_at_the_end, _exchange, _drop_the_last])
def test_what_a_module_consists_of_is_watched(change: Callable[[Any], None]) -> None:
    block: Any = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Identity())
    block[1].inner = torch.nn.Identity()
    block[2].register_buffer("last", torch.zeros(1))
    watch = Watch(block)
    assert not watch.moved()
    change(block)
    assert watch.moved()


@pytest.mark.skipif(interpreted(), reason="the compiler would trace Triton's interpreter, which is Python")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@torch.no_grad()
def test_a_compiled_model_need_not_have_run_before() -> None:
    """Weights are prepared outside of what is traced, at first and when they have changed."""
    inputs = padded_inputs()
    for kernels in KERNELS:
        model = add_skimming(tiny("bert", "sequence"), kernels=kernels)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            out = compiled(**inputs).logits
            torch.testing.assert_close(out, model(**inputs).logits, rtol=1e-5, atol=1e-5)
            for parameter in model.parameters():
                parameter.mul_(1.1)


@pytest.mark.parametrize("record", [torch.jit.trace, torch.export.export])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False])
def test_what_cannot_be_recorded_says_so(whole: bool, record: Callable[..., Any]) -> None:
    model: Any = add_skimming(tiny("bert", "sequence"))
    model = model if whole else torch.nn.Sequential(model)
    with pytest.raises(RuntimeError, match=r"^model: torch\.export and torch\.jit\.trace cannot take a skimming model"):
        record(model, (padded_inputs()["input_ids"],))


@torch.no_grad()
def test_kernels_can_be_switched_on_a_live_model() -> None:
    model = add_skimming(tiny("bert", "sequence"))
    undecided_predictors(model)
    inputs = padded_inputs()
    native = model(**inputs).logits
    assert set(model.skimming.serves.values()) == {KERNELS[-1]}
    model.skimming.kernels = "reference"
    assert set(model.skimming.serves.values()) == {"reference"}
    assert torch.allclose(model(**inputs).logits, native, atol=1e-5)
    with pytest.raises(ValueError, match=r"kernels='fastest'.*auto, reference, cpu"):
        model.skimming.kernels = "fastest"
    with pytest.raises(BackendUnavailable, match="cuda"):
        model.skimming.kernels = "cuda"
    assert model.skimming.kernels == "reference"


@pytest.mark.parametrize("name", ["enabled", "first_token_only", "graphed_training"])
def test_a_switch_is_true_or_false(name: str) -> None:
    skimming = add_skimming(tiny("bert")).skimming
    with pytest.raises(ValueError, match=f"{name}='no': must be True or False"):
        setattr(skimming, name, "no")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_attention_is_refused(implementation: str) -> None:
    model = add_skimming(tiny("bert", "sequence"))
    model.set_attn_implementation(implementation)
    inputs = padded_inputs()
    for given in (inputs, {"input_ids": inputs["input_ids"]}):  # without padding it would not matter
        with pytest.raises(ValueError, match=f"attn_implementation='{implementation}': .* must stay 'transkimmer'"):
            model(**given)
    model.set_attn_implementation("transkimmer")
    model(**inputs)


@pytest.mark.parametrize("name", ["graphed_trainig", "config", "threshold"])
def test_what_is_no_setting_cannot_be_set(name: str) -> None:
    skimming = add_skimming(tiny("bert")).skimming
    with pytest.raises(AttributeError, match=name):
        setattr(skimming, name, True)


@pytest.mark.default_kernels("is about the choice of `auto`")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@torch.no_grad()
def test_auto_serves_dtypes_that_the_native_kernels_do_not(dtype: torch.dtype) -> None:
    model = tiny("bert", "sequence").to(dtype)
    inputs = padded_inputs()
    dense = model(**inputs).logits
    assert torch.allclose(add_skimming(model)(**inputs).logits, dense, rtol=1e-2, atol=1e-2)
    assert set(model.skimming.serves.values()) == {"reference"}
    with pytest.raises(BackendUnavailable, match=r"cpu: computes in torch.float32, torch.bfloat16, not in"):
        model.skimming.kernels = "cpu"


def test_pipeline(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    model = add_skimming(tiny("bert", "sequence"))
    undecided_predictors(model)
    texts = ["a good film", "bad", "films films films a bad bad film"]
    together = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts, batch_size=3)
    alone = [pipeline("text-classification", model=model, tokenizer=tokenizer)(text)[0] for text in texts]
    for a, b in zip(together, alone, strict=True):
        assert a["label"] == b["label"] and a["score"] == pytest.approx(b["score"], abs=1e-5)


@pytest.mark.default_kernels("Triton's interpreter is not made for threads")
@torch.no_grad()
def test_threads_do_not_mix_up_their_records() -> None:
    model = add_skimming(tiny("bert"))
    undecided_predictors(model)
    found: dict[int, list[int]] = {}

    def work(length: int) -> None:
        with torch.no_grad(), record_skimming() as records:
            for _ in range(10):
                model(**padded_inputs((length, 3)))
        found[length] = [int(record.lengths[0]) for record in records]

    threads = [threading.Thread(target=work, args=(length,)) for length in (5, 9, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {length: [length] * 10 for length in (5, 9, 17)}


@torch.no_grad()
def test_autocast_inference() -> None:
    model = add_skimming(tiny("bert", "sequence"))
    inputs = padded_inputs()
    full = model(**inputs).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(**inputs).logits
    assert 0 < (half - full).abs().max() < 0.1 * full.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_training(dtype: torch.dtype) -> None:
    model = add_skimming(tiny("bert", "sequence")).train()
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**padded_inputs(), labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    assert model.skimming.predictors[0].fc.weight.grad.isfinite().all()


class MeanForSequenceClassification(BertPreTrainedModel):
    """Somebody's own head: whatever its name says, it reads every token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        return (states * attention_mask[..., None]).sum(1)


@torch.no_grad()
def test_a_head_of_ones_own_gets_every_state() -> None:
    model = MeanForSequenceClassification(config_of("bert")).eval()
    expected = model(**padded_inputs())
    add_skimming(model)
    assert not model.skimming.first_token_only
    torch.testing.assert_close(model(**padded_inputs()), expected, rtol=1e-4, atol=1e-4)


def test_a_gradient_through_eval_mode_is_refused() -> None:
    model = add_skimming(tiny("bert", "sequence"))
    output = model(**padded_inputs(), labels=torch.tensor([0, 1, 0, 1]))
    with pytest.raises(RuntimeError, match=r"eval mode.*model.train"):
        output.loss.backward()


def test_models_that_cannot_skim() -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is of type 'gpt2'.*bert, roberta, .*distilbert, albert"):
        add_skimming(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)))
    with pytest.raises(ValueError, match="is_decoder"):
        add_skimming(tiny("bert", "mlm", is_decoder=True))
    model = add_skimming(tiny("bert"))
    with pytest.raises(ValueError, match="already has skimming"):
        add_skimming(model)
    with pytest.raises(ValueError, match="has no skimming"):
        remove_skimming(tiny("bert"))
    with pytest.raises(ValueError, match="has 2 ratios, but the model has 3 layers"):
        add_skimming(tiny("bert"), SkimConfig(schedule=[1.0, 0.5]))


def test_what_is_no_model_and_what_is_no_config() -> None:
    with pytest.raises(TypeError, match=r"model=None: must be a Hugging Face model, got NoneType"):
        add_skimming(None)
    model = tiny("bert")
    with pytest.raises(TypeError, match=r"config='triton': must be a SkimConfig .* did you mean kernels='triton'\?"):
        add_skimming(model, "triton")
    with pytest.raises(TypeError, match=r"config=\{'threshold': 0.7\}: must be a SkimConfig or None, got dict$"):
        add_skimming(model, {"threshold": 0.7})


OUT_OF_RANGE = pytest.mark.parametrize(
    ("field", "value"),
    [
        ("predictor_width", 0),
        ("bias_init", -1.0),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("noise", -0.5),
        ("skim_weight", float("inf")),
        ("decision", "guess"),
        ("threshold", 1.0),
        ("threshold", 2.0),
        ("threshold", 0),
        ("threshold", -1),
        ("threshold", float("nan")),
        ("skim_attention", "none"),
        ("pruned_training", 1),
        ("pruned_training", "yes"),
        ("schedule", [0.5, 0.8]),
        ("schedule", [1.2]),
        ("schedule", 0.5),
    ],
)


@OUT_OF_RANGE
def test_config_names_what_is_wrong(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"SkimConfig.{field}=.*must be"):
        SkimConfig(**{field: value})


@OUT_OF_RANGE
def test_a_live_config_keeps_its_value_when_it_is_given_a_bad_one(field: str, value: object) -> None:
    config = add_skimming(tiny("bert")).skimming.config
    before = config.to_dict()
    with pytest.raises(ValueError, match=rf"SkimConfig.{field}=.*must be"):
        setattr(config, field, value)
    assert config.to_dict() == before


def test_published_attention_prunes_nothing() -> None:
    """In whichever order the two are set."""
    refused = r"^SkimConfig.{}=.*pruned_training=True does not go with skim_attention='published'"
    with pytest.raises(ValueError, match=refused.format("pruned_training")):
        SkimConfig(skim_attention="published", pruned_training=True)
    config = SkimConfig(pruned_training=True)
    with pytest.raises(ValueError, match=refused.format("skim_attention")):
        config.skim_attention = "published"
    assert config == SkimConfig(pruned_training=True)


def test_a_live_schedule_has_a_ratio_per_layer() -> None:
    model = add_skimming(tiny("bert"))
    config = model.skimming.config
    with pytest.raises(ValueError, match="has 2 ratios, but the model has 3 layers"):
        config.schedule = [1.0, 0.5]
    config.schedule = [1.0, 0.5, 0.5]
    with pytest.raises(AttributeError, match=r"SkimConfig.treshold: unknown field"):
        config.treshold = 0.7
    remove_skimming(model)
    config.schedule = [1.0, 0.5]


def test_a_failed_call_leaves_the_model_alone() -> None:
    model = tiny("bert")
    names = list(model.state_dict())
    with pytest.raises(BackendUnavailable):
        add_skimming(model, kernels="cuda")
    assert list(model.state_dict()) == names and type(model.encoder).__name__ == "BertEncoder"


@torch.no_grad()
def test_adapters_are_refused_with_a_hint() -> None:
    model = add_skimming(tiny("bert"))
    dense = model.encoder.layer[0].output.dense
    model.encoder.layer[0].output.dense = torch.nn.Sequential(dense)
    with pytest.raises(TypeError, match=r"output.dense is a Sequential.*merge adapters"):
        model(**padded_inputs())


def test_albert_applies_one_layer_often_and_has_a_predictor_each_time() -> None:
    model = add_skimming(tiny("albert"))
    assert len(model.skimming.predictors) == config_of("albert").num_hidden_layers
