"""When training by graphs runs eagerly, and how graphs come and go; tapes on the CPU."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transkimmer.flops import count_flops
from transkimmer.training_forward import decisions_without_noise

from transkimmer_kernels.runtime.graphs import ENGINES

from .graphed_steps import BATCHES, StepTapes, assert_close, assert_step, eagerly, graphed, loss_of, step
from .tiny import padded_inputs

pytestmark = [
    pytest.mark.default_kernels("is about what stands around the kernels, and too long for an interpreter"),
    pytest.mark.usefixtures("step_tapes"),
]


def _checkpointed(model: PreTrainedModel) -> None:
    model.gradient_checkpointing_enable()


def _hooked(model: PreTrainedModel) -> None:
    model.bert.encoder.layer[0].register_forward_hook(lambda *args: None)


def _hooked_backwards(model: PreTrainedModel) -> None:
    model.bert.encoder.layer[1].output.dense.register_full_backward_pre_hook(lambda *args: None)


def _hooked_parameter(model: PreTrainedModel) -> None:
    model.bert.encoder.layer[1].output.dense.weight.register_hook(lambda gradient: 0.5 * gradient)


def _replica(model: PreTrainedModel) -> None:
    model.bert.encoder._is_replica = True


def _pruned(model: PreTrainedModel) -> None:
    model.skimming.config.pruned_training = True


def _partly_in_eval_mode(model: PreTrainedModel) -> None:
    model.bert.encoder.layer[0].eval()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_checkpointed, "gradient checkpointing is on"),
        (_hooked, "a part of the encoder has hooks, which a replay would not call"),
        (_hooked_backwards, "a part of the encoder has hooks, which a replay would not call"),
        (_hooked_parameter, "a parameter of the encoder has hooks, which a replay would not call"),
        (_replica, "nn.DataParallel makes new parameters for every step"),
        (_pruned, "pruned training asks the device how many tokens are left"),
        (_partly_in_eval_mode, "a part of the encoder is in eval mode"),
    ],
)
def test_what_runs_eagerly_and_says_why(change: Callable[[PreTrainedModel], None], reason: str) -> None:
    model, twin = graphed(), graphed()
    twin.skimming.graphed_training = False
    for m in (model, twin):  # a copy would have no hooks
        change(m)
    loss, actual, record = step(model, BATCHES[0])
    assert model.skimming.training_graphs.why_eager == reason
    expected_loss, expected, expected_record = step(twin, BATCHES[0])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(actual, expected)
    assert torch.equal(record.keep_masks, expected_record.keep_masks)


def test_forwards_that_need_no_gradient_run_eagerly() -> None:
    model = graphed()
    with torch.no_grad():
        loss_of(model, BATCHES[0])
    assert model.skimming.training_graphs.why_eager == "gradients are off"
    with decisions_without_noise(0.0):
        loss_of(model, BATCHES[0]).backward()
    assert model.skimming.training_graphs.why_eager == "decisions are made without noise"


def test_distributed_training_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphed()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert_step(model, BATCHES[0], why_eager="training is distributed")


def test_a_batch_without_tokens_runs_eagerly() -> None:
    model, inputs = graphed(), padded_inputs((3, 2))
    assert_step(model, BATCHES[0])
    inputs["attention_mask"].zero_()
    loss = model(**inputs, labels=torch.tensor([0, 1])).loss
    assert model.skimming.training_graphs.why_eager == "the batch has no tokens"
    assert torch.isfinite(loss)


def test_flops_of_a_step_are_counted_eagerly() -> None:
    """A replay has no operators to count."""

    def flops(model: PreTrainedModel) -> int:
        with count_flops() as count:
            loss_of(model, BATCHES[0])
        return count.get_total_flops()

    model = graphed()
    assert_step(model, BATCHES[0])
    assert flops(model) == eagerly(model, flops) > 0
    assert model.skimming.training_graphs.why_eager == "the forward is being traced"


def test_hooks_that_hugging_face_leaves_idle_do_no_harm() -> None:
    """They come with the first request for states of every layer, and stay, also when it was refused."""
    model = graphed()
    with pytest.raises(ValueError, match="output_attentions"):
        model(**padded_inputs(BATCHES[0]), output_attentions=True)
    layer = model.bert.encoder.layer[0]
    assert layer._forward_hooks
    assert_step(model, BATCHES[0])
    layer.register_full_backward_hook(lambda *args: None)
    step(model, BATCHES[0])
    assert model.skimming.training_graphs.why_eager == "a part of the encoder has hooks, which a replay would not call"


@pytest.mark.parametrize(
    ("name", "values"), [("config.skim_attention", ("renormalized", "published")), ("kernels", ("reference", "cpu"))]
)
def test_what_python_decides_in_a_layer_has_a_graph_of_its_own(name: str, values: tuple[str, str]) -> None:
    model = graphed()
    part, _, attribute = name.rpartition(".")
    for value in (*values, values[0]):
        setattr(operator.attrgetter(part)(model.skimming) if part else model.skimming, attribute, value)
        assert_step(model, BATCHES[0])
    assert len(model.skimming.training_graphs) == 2


def _fail(self: StepTapes, run: Callable[[], Any]) -> Any:
    raise RuntimeError("no")


def test_what_cannot_be_captured_runs_eagerly_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepTapes, "record", _fail)
    model = graphed()
    with pytest.warns(UserWarning, match="trains without a CUDA graph: capturing failed: RuntimeError: no"):
        step(model, BATCHES[0])
    assert_step(model, BATCHES[0], why_eager="capturing failed: RuntimeError: no")


def test_a_failed_capture_takes_all_graphs_along(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphed()
    assert_step(model, (3,))
    former = model.skimming.training_graphs._engine
    with monkeypatch.context() as failing:
        failing.setattr(StepTapes, "record", _fail)
        with pytest.warns(UserWarning, match="capturing failed"):
            step(model, (3, 3))
    assert len(model.skimming.training_graphs) == 0
    assert_step(model, (3,))
    assert model.skimming.training_graphs._engine is not former


def test_graphs_that_a_failed_capture_elsewhere_has_changed_are_captured_anew() -> None:
    model = graphed()
    assert_step(model, BATCHES[0])
    former = model.skimming.training_graphs._engine
    former.stale = True
    model.skimming.training_graphs._refused["a size"] = "capturing failed"
    assert_step(model, BATCHES[0])
    assert model.skimming.training_graphs._engine is not former
    assert "a size" in model.skimming.training_graphs._refused, "or captures of two models would fail in turn for ever"


def test_a_model_that_is_moved_gives_the_memory_of_its_graphs_back() -> None:
    model = graphed()
    assert_step(model, BATCHES[0])
    model.double()
    assert len(model.skimming.training_graphs) == 0 and model.skimming.training_graphs._watch is None


def test_the_number_of_graphs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transkimmer.graphed_training._MAX_GRAPHS", 2)
    model = graphed()
    for lengths in ((3,), (3, 3), (3, 3, 3), (3,)):
        assert_step(model, lengths)
        assert len(model.skimming.training_graphs) <= 2


def test_the_graph_used_least_recently_goes_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transkimmer.graphed_training._MAX_GRAPHS", 2)
    model, held = graphed(), []
    graphs = model.skimming.training_graphs
    monkeypatch.setattr(StepTapes, "wait", lambda self: held.append(len(graphs)))
    for lengths in ((3,), (3, 3), (3,), (3, 3, 3)):
        assert_step(model, lengths)
    assert held == [2], "a graph may still be running when its buffers go"
    assert [key[0].batch for key in graphs._steps] == [1, 3]


def test_sizes_that_are_seldom_used_are_not_captured() -> None:
    model = graphed()
    model.skimming.training_graphs.uses_before = 2
    for used in (1, 2):
        assert_step(model, BATCHES[0], why_eager=f"its size has been used {used} times, of 2 before a capture")
    assert_step(model, BATCHES[0])
    assert copy.deepcopy(model).skimming.training_graphs.uses_before == 2


def test_it_is_on_or_off() -> None:
    with pytest.raises(ValueError, match=r"graphed_training='off': must be True or False"):
        graphed().skimming.graphed_training = "off"


def test_copies_start_without_graphs() -> None:
    model = graphed()
    assert_step(model, BATCHES[0])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.skimming.graphed_training and len(twin.skimming.training_graphs) == 0
        assert_step(twin, BATCHES[0])
    model.skimming.graphed_training = False
    assert model.skimming.training_graphs is None


def test_nothing_happens_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ENGINES, "cpu")
    assert_step(graphed(), BATCHES[0], why_eager="the model is on cpu")
