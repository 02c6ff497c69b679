"""`model.forward` by captured graphs, tapes on the CPU: equal to eager for every architecture, head and input."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from transkimmer import SkimConfig, add_skimming, record_skimming, remove_skimming

from transkimmer_kernels.runtime.graphs import ENGINES

from ..tape import TapeEngine
from .tiny import ARCHITECTURES, HEADS, LAYERS, padded_inputs, tiny, undecided_predictors

pytestmark = pytest.mark.default_kernels("is about what stands around the kernels, and too long for an interpreter")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
# Full, shorter, fewer, one of one token, an empty sequence among others.
BATCHES = ((9, 1, 14, 5), (3, 8, 2, 8), (7, 2), (16, 16, 16, 16), (1, 1), (16, 1, 2, 3))


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device that captures, and is not asked for values."""
    monkeypatch.setitem(ENGINES, "cpu", TapeEngine)
    monkeypatch.setattr("transkimmer.encoder._known_to_start_in_front", lambda mask: False)


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transkimmer.encoder._known_to_start_in_front", lambda mask: False)


def skimming(architecture: str = "bert", head: str | None = "sequence", **config: Any) -> PreTrainedModel:
    model = add_skimming(tiny(architecture, head), SkimConfig(**config))
    undecided_predictors(model)
    return model


def eager(model: PreTrainedModel, inputs: dict[str, Any]) -> ModelOutput:
    """By the class's own forward."""
    return type(model).forward(model, **inputs)


def assert_replayed(model: PreTrainedModel, inputs: dict[str, Any]) -> ModelOutput:
    """One replay, as the eager forward in class, shapes and values, padding included."""
    replays = model.skimming.graphs.replays
    actual = model(**inputs)
    assert model.skimming.why_eager is None and model.skimming.graphs.replays == replays + 1
    expected = eager(model, inputs)
    assert type(actual) is type(expected) and list(actual) == list(expected)
    for name in expected:
        assert actual[name].shape == expected[name].shape and actual[name].dtype == expected[name].dtype
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)
    return actual


@every_architecture
@pytest.mark.parametrize("head", [None, *HEADS])
@torch.no_grad()
def test_replays_equal_eager_forwards(architecture: str, head: str | None, tapes: None) -> None:
    model = skimming(architecture, head)
    choices = 2 if head == "choice" else None
    model.skimming.capture(5 if choices is None else 2, 18, num_choices=choices)
    kept = []
    for lengths in BATCHES:
        inputs = padded_inputs(lengths, choices=choices or 0)
        output = assert_replayed(model, inputs)
        kept.append((output, {name: x.clone() for name, x in output.items()}))
    assert model.skimming.graphs.captures == 1
    for output, copied in kept:
        assert all(torch.equal(output[name], x) for name, x in copied.items()), "a later replay changed a result"


@every_architecture
@torch.no_grad()
def test_every_kind_of_input(architecture: str, tapes: None) -> None:
    model = skimming(architecture, "token")
    inputs = padded_inputs()
    shape = inputs["input_ids"].shape
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    offset = 2 if architecture == "roberta" else 0
    variants: list[dict[str, Any]] = [
        {**inputs, "position_ids": torch.arange(shape[1])[None] + offset},
        {**inputs, "position_ids": torch.arange(shape[1]).expand(shape) + offset},
        {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]},
        {"input_ids": inputs["input_ids"]},
        {"input_ids": inputs["input_ids"].int(), "attention_mask": inputs["attention_mask"].bool()},
        {**inputs, "attention_mask": (torch.rand(shape) < 0.5).float(), "return_dict": True, "labels": None},
        padded_inputs(side="left"),
    ]
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        types = torch.zeros(shape, dtype=torch.long) if architecture == "roberta" else torch.randint(0, 2, shape)
        variants.append({**inputs, "token_type_ids": types})
    model.skimming.capture(5, 20)
    for variant in variants:
        assert_replayed(model, variant)
    positional = model(inputs["input_ids"], inputs["attention_mask"])
    assert model.skimming.why_eager is None
    torch.testing.assert_close(positional.logits, eager(model, inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_either_way_of_doing_without_gradients(mode: Callable[[], Any], tapes: None) -> None:
    model = skimming()
    with mode():
        model.skimming.capture(4, 16)
        assert_replayed(model, padded_inputs())
    with torch.inference_mode():
        created_inside = padded_inputs()
    with torch.no_grad():
        output = assert_replayed(model, created_inside)
    assert model.skimming.graphs.captures == 1 and not output.logits.requires_grad


FALLBACKS: dict[str, tuple[Callable[[PreTrainedModel, dict[str, Any]], Any], str]] = {
    "labels": (lambda m, x: m(**x, labels=torch.tensor([0, 1, 0, 1])), "the argument labels was given"),
    "packed": (
        lambda m, x: m(input_ids=x["input_ids"][:1], cu_seq_lens_q=torch.tensor([0, 5, 14])),
        "the argument cu_seq_lens_q was given",
    ),
    "packed by positions": (
        lambda m, x: m(input_ids=x["input_ids"][:1], position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, *range(2, 9)]])),
        "position_ids without an attention_mask may mean a packed row",
    ),
    "tuple": (lambda m, x: m(**x, return_dict=False), "the argument return_dict was given"),
    "empty": (lambda m, x: m(input_ids=x["input_ids"][:0]), "the input has the shape"),
    "gradients": (lambda m, x: torch.enable_grad()(m)(**x), "gradients are enabled"),
    "autocast": (lambda m, x: torch.autocast("cpu", torch.bfloat16)(m)(**x), "autocast is on"),
    "recording": (lambda m, x: record_skimming()(m)(**x), "record_skimming() is open"),
    "counting": (lambda m, x: _counted(m, x), "the forward is being traced"),
    "training": (lambda m, x: m.train()(**x), "the model is in training mode"),
    "dropout on": (lambda m, x: m.dropout.train() and m(**x), "a part of the model is in training mode"),
    "hook": (lambda m, x: m.classifier.register_forward_hook(print) and m(**x), "a part of the model has hooks"),
    "off": (lambda m, x: setattr(m.skimming, "cuda_graphs", "off") or m(**x), "cuda_graphs is 'off'"),
}


def _counted(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Any:
    with FlopCounterMode(display=False):
        return model(**inputs)


@pytest.mark.parametrize("name", FALLBACKS)
@torch.no_grad()
def test_what_runs_eagerly_and_says_why(name: str, tapes: None) -> None:
    model, inputs = skimming(), padded_inputs()
    model.skimming.capture(4, 16)
    replays = model.skimming.graphs.replays
    run, reason = FALLBACKS[name]
    run(model, inputs)
    assert reason in model.skimming.why_eager
    assert model.skimming.graphs.replays == replays


@torch.no_grad()
def test_training_and_switching_off_give_the_memory_back(tapes: None) -> None:
    model, inputs = skimming(), padded_inputs()
    for stop in (lambda: model.train()(**inputs), lambda: setattr(model.skimming, "cuda_graphs", "off")):
        model.eval().skimming.capture(4, 16)
        assert model.skimming.graphs.bytes_held
        stop()
        assert len(model.skimming.graphs) == model.skimming.graphs.bytes_held == 0


@torch.no_grad()
def test_wrong_inputs_raise_what_they_always_did(tapes: None) -> None:
    model, inputs = skimming(), padded_inputs()
    model.skimming.capture(4, 16)
    with pytest.raises(ValueError, match=r"attention_mask: .*padding mask"):
        model(input_ids=inputs["input_ids"], attention_mask=torch.ones(4, 1, 14, 14))
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(**inputs, output_hidden_states=True)
    with pytest.raises(TypeError, match="multiple values"):
        model(inputs["input_ids"], **inputs)
    model.config.output_hidden_states = True
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(**inputs)


@pytest.mark.parametrize("when", ["before add_skimming", "after a capture"])
@torch.no_grad()
def test_hooks_that_hugging_face_leaves_idle_do_no_harm(when: str, tapes: None) -> None:
    """They come with the first request for states of every layer, and stay, also when it was refused."""
    model, inputs = tiny("bert", "sequence"), padded_inputs()
    if when == "before add_skimming":
        model(**inputs, output_hidden_states=True, output_attentions=True)
    model = add_skimming(model)
    model.skimming.capture(4, 16)
    if when == "after a capture":
        with pytest.raises(ValueError, match="output_attentions"):
            model(**inputs, output_attentions=True)
    layer = model.bert.encoder.layer[0]
    assert layer._forward_hooks
    assert_replayed(model, inputs)
    layer.register_forward_hook(print)
    model(**inputs)
    assert "a part of the model has hooks" in model.skimming.why_eager


@every_architecture
@torch.no_grad()
def test_offsets_that_are_given_count_whatever_positions_say(architecture: str) -> None:
    model = skimming(architecture, "token")
    row = {"input_ids": torch.arange(5, 19)[None], "position_ids": torch.tensor([[0, 1, 2, 3, 4, *range(9)]])}
    with record_skimming() as records:
        model(**row)
        model(**row, cu_seq_lens_q=torch.tensor([0, 14], dtype=torch.int32), max_length_q=14)
    assert [record.lengths.tolist() for record in records] == [[5, 9], [14]]


@torch.no_grad()
def test_copies_have_graphs_of_their_own(tapes: None) -> None:
    model, inputs = skimming(), padded_inputs()
    model.skimming.capture(4, 16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(other.skimming.graphs) == 0
        other.skimming.config.threshold = 0.999
        assert_replayed(other, inputs)
        assert_replayed(model, inputs)
        assert not torch.equal(other(**inputs).logits, model(**inputs).logits)
    replica = model._replicate_for_data_parallel()
    replays = model.skimming.graphs.replays
    assert torch.equal(replica.forward(**inputs).logits, type(model).forward(model, **inputs).logits)
    assert model.skimming.graphs.replays == replays and replica.forward is not model.forward
    gone = weakref.ref(replica)
    del replica
    assert gone() is None


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@torch.no_grad()
def test_the_model_stays_a_hugging_face_model(tapes: None) -> None:
    dense, inputs = tiny("bert", "sequence"), padded_inputs()
    signature = inspect.signature(dense.forward)
    model = add_skimming(dense)
    assert inspect.signature(model.forward) == signature, "Trainer reads the columns from it"
    model.skimming.capture(4, 16)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(remove_skimming(model))


@torch.no_grad()
def test_a_graph_keeps_the_weights_it_was_captured_with(tapes: None) -> None:
    """Those of another setting take their place in the model, not in the graph."""
    model, inputs = skimming(), padded_inputs()
    model.skimming.capture(4, 16)
    prepared = weakref.ref(model.bert.encoder.skim_weights.held)
    expected = assert_replayed(model, inputs).logits
    model.skimming.first_token_only = False
    model(**inputs)
    assert model.skimming.why_eager is None and len(model.skimming.graphs) == 2
    gc.collect()
    assert prepared() is not None and prepared() is not model.bert.encoder.skim_weights.held
    model.skimming.first_token_only = True
    assert torch.equal(model(**inputs).logits, expected) and model.skimming.why_eager is None


def test_threads_and_models(tapes: None) -> None:
    models = [skimming(), skimming("albert", "token")]
    wrong: list[BaseException] = []

    def work(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
        try:
            with torch.no_grad():
                expected = eager(model, inputs).logits
                for _ in range(5):
                    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        except BaseException as error:
            wrong.append(error)

    batches = [padded_inputs(lengths) for lengths in ((5, 3), (9, 1, 14), (16,))]
    for model in models:  # prepares the weights, once
        with torch.no_grad():
            model(**batches[0])
    threads = [threading.Thread(target=work, args=(model, batch)) for model in models for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(len(model.skimming.graphs) == 3 for model in models)


@torch.no_grad()
def test_forwards_take_turns(tapes: None) -> None:
    """Also where nothing is replayed: what was noted about sizes and modules belongs to one thread at a time."""
    model = skimming()
    model(**padded_inputs())
    other = threading.Thread(target=torch.no_grad()(model), kwargs=padded_inputs((3,)))
    with model.skimming.graphs.lock:
        other.start()
        other.join(0.3)
        assert other.is_alive()
    other.join()


@torch.no_grad()
def test_a_predictor_whose_weight_is_computed() -> None:
    model, inputs = skimming(), padded_inputs()
    expected = model(**inputs).logits
    weight_norm(model.skimming.predictors[0].fc)  # a parametrization of the same weight
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_nothing_happens_on_a_cpu() -> None:
    model, inputs = skimming(), padded_inputs()
    assert model.skimming.cuda_graphs == "auto"
    for _ in range(3):
        model(**inputs)
    assert model.skimming.why_eager == "the model is on cpu" and len(model.skimming.graphs) == 0
    with pytest.raises(RuntimeError, match="capture: not now: the model is on cpu"):
        model.skimming.capture(4, 16)


@every_architecture
@pytest.mark.parametrize("head", [None, "sequence"])
@torch.no_grad()
def test_a_forward_traced_with_fake_tensors_serves_every_batch(
    architecture: str, head: str | None, no_reads: None
) -> None:
    """Traced once without values, so that nothing could branch on them; then run on others, of other lengths."""
    model = skimming(architecture, head)
    inputs = [padded_inputs(lengths) for lengths in BATCHES if len(lengths) == 4 and max(lengths) == 16]
    inputs.append({**inputs[0], "attention_mask": (torch.rand(4, 16) < 0.5).long()})

    def forward(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return dict(model(input_ids=ids, attention_mask=mask))

    model(**inputs[0])  # prepares the weights, which are not fake
    shapes = (torch.ones(4, 16, dtype=torch.long) for _ in range(2))
    traced = make_fx(forward, tracing_mode="fake", _allow_non_fake_inputs=True)(*shapes)
    operators = [str(node.target) for node in traced.graph.nodes]
    assert sum("transkimmer.encoder_layer_" in name for name in operators) == LAYERS
    assert sum("transkimmer.skim_tokens" in name for name in operators) == LAYERS
    for batch in inputs:
        expected = model(**batch)
        for name, x in traced(batch["input_ids"], batch["attention_mask"]).items():
            assert torch.equal(x, expected[name])


@torch.no_grad()
def test_a_model_that_has_left_the_device_holds_nothing_there(tapes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even what was noted at the first forward of a size, when there is no graph yet."""
    model = skimming()
    model(**padded_inputs())
    assert model.forward._watch is not None and len(model.skimming.graphs) == 0
    monkeypatch.delitem(ENGINES, "cpu")
    model(**padded_inputs())
    assert model.forward._watch is None
