"""Where the skim loss goes: into a head's loss, a trainer's, a loss of one's own; and what wraps a model's forward."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import BertModel, PreTrainedModel, set_seed
from transformers.modeling_outputs import SequenceClassifierOutput
from transkimmer import SkimConfig, add_skimming, from_pretrained, losses, record_skimming, remove_skimming
from transkimmer.training import SkimTrainer, SkimTrainingArguments, evaluate, trainer
from transkimmer.training.trainer import distillation_loss

from .tiny import HEADS, config_of, no_dropout, padded_inputs, relative_error, tiny, undecided_predictors

pytestmark = pytest.mark.default_kernels("is about losses and forwards, and not about kernels")
LABELS = torch.tensor([0, 1, 1, 0])


def skimming(head: str | None = "sequence", **settings: Any) -> PreTrainedModel:
    model = add_skimming(no_dropout(tiny("bert", head)), SkimConfig(**{"noise": 0.0, **settings}))
    undecided_predictors(model)
    return model


def trainer_of(model: PreTrainedModel, folder: Path, *, func: Any = None, **options: Any) -> SkimTrainer:
    quiet: dict[str, Any] = {"use_cpu": True, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    arguments = SkimTrainingArguments(output_dir=str(folder), max_steps=1, **quiet, **options)
    inputs = padded_inputs((9, 9, 9, 9))
    rows = [{**{name: x[i] for name, x in inputs.items()}, "labels": i % 2} for i in range(4)]
    return SkimTrainer(model=model, args=arguments, train_dataset=rows, compute_loss_func=func)


def of_my_own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return torch.nn.functional.cross_entropy(outputs.logits, labels)


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"func": of_my_own}], ids=["smoothed", "own"])
def test_a_trainer_that_takes_the_labels_away_adds_the_skim_loss(options: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for weight in (0.0, 2.0):
        model = skimming(skim_weight=weight).train()
        job = trainer_of(model, tmp_path, **options)
        with record_skimming() as records:
            found.append(job.compute_loss(model, {**padded_inputs(), "labels": LABELS}))
    share = records[0].skim_loss
    assert (found[1] - found[0]).item() == pytest.approx(2.0 * share.item(), rel=1e-4)


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"func": of_my_own}], ids=["smoothed", "own"])
def test_what_is_added_weighs_as_much_in_accumulated_batches(options: dict[str, Any], tmp_path: Path) -> None:
    """`Trainer` divides a mean by the number of batches, but not what a loss function of one's own returns."""
    found = []
    for weight, steps in ((0.0, 4), (2.0, 4), (2.0, 1)):
        model = skimming(skim_weight=weight).train()
        job = trainer_of(model, tmp_path, gradient_accumulation_steps=steps, **options)
        job.current_gradient_accumulation_steps = steps
        found.append(job.compute_loss(model, {**padded_inputs(), "labels": LABELS}).item())
    task, accumulated, alone = found
    share = 0.25 if "func" in options else 1.0
    assert accumulated - task == pytest.approx(share * (alone - task), rel=1e-4) and alone - task > 0.1


def test_a_loss_function_that_leaves_the_models_loss_alone_gets_the_skim_loss(tmp_path: Path) -> None:
    """Labels of other names reach the model, whose loss nobody looks at then."""
    inputs = {**padded_inputs(), "start_positions": torch.zeros(4).long(), "end_positions": torch.zeros(4).long()}
    found = []
    for weight in (0.0, 2.0):
        model = skimming("qa", skim_weight=weight).train()
        job = trainer_of(model, tmp_path, func=lambda outputs, labels, num_items_in_batch: outputs.start_logits.mean())
        with record_skimming() as records:
            found.append(job.compute_loss(model, dict(inputs)).item())
    assert found[1] - found[0] == pytest.approx(2.0 * records[0].skim_loss.item(), rel=1e-4)


def test_a_loss_of_ones_own() -> None:
    losses._warn.cache_clear()
    model = skimming(None, skim_weight=0.5, skim_target=0.1).train()
    with warnings.catch_warnings(), record_skimming() as records:
        warnings.simplefilter("error")
        model(**padded_inputs())
        model(**padded_inputs((3, 12)))
    shares = [record.skim_loss.item() for record in records]
    penalty = model.skimming.penalty(records)
    assert penalty.item() == pytest.approx(0.5 * (sum(shares) / 2 - 0.1), rel=1e-5)
    penalty.backward()
    assert model.skimming.predictors[0].out.weight.grad.abs().sum() > 0
    with pytest.warns(UserWarning, match=r"has made no loss .* model\.skimming\.penalty"):
        model(**padded_inputs())
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        model(**padded_inputs())
    losses._warn.cache_clear()
    with pytest.warns(UserWarning, match="has made no loss"):  # by a part of it
        skimming().train().bert(**padded_inputs())
    with record_skimming() as records:
        model.eval()(**padded_inputs())
    with pytest.raises(ValueError, match=r"records: 1 of them, but of no forward in training"):
        model.skimming.penalty(records)


@pytest.mark.parametrize(
    "quiet", [lambda m: m.eval(), lambda m: setattr(m.skimming.config, "skim_weight", 0.0), lambda m: None]
)
def test_no_warning_where_nothing_is_lost(quiet: Any) -> None:
    losses._warn.cache_clear()
    model = skimming().train()
    quiet(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**padded_inputs(), labels=LABELS)
        with torch.no_grad():
            model(**padded_inputs())


def test_a_tuple_without_a_loss_is_left_alone() -> None:
    """Its first tensor is none that a loss could be added to."""
    model, found = skimming().train(), []
    for return_dict in (True, False):
        with record_skimming():
            found.append(model(**padded_inputs(), return_dict=return_dict)[0])
    torch.testing.assert_close(*found)


def test_two_texts_in_one_forward_count_as_their_mean() -> None:
    class Siamese(type(tiny("bert", "sequence"))):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, other_ids: Tensor, labels: Tensor) -> SequenceClassifierOutput:
            apart = [self.bert(ids).pooler_output for ids in (input_ids, other_ids)]
            return SequenceClassifierOutput(loss=(apart[0] - apart[1]).pow(2).mean())

    torch.manual_seed(0)
    model = add_skimming(no_dropout(Siamese(config_of("bert"))), SkimConfig(noise=0.0, skim_weight=0.0)).train()
    undecided_predictors(model)
    one, other = padded_inputs((12, 12))["input_ids"], padded_inputs((5, 5))["input_ids"]
    plain = model(one, other, LABELS).loss
    model.skimming.config.skim_weight = 3.0
    with record_skimming() as records:
        raised = model(one, other, LABELS).loss
    shares = [record.skim_loss.item() for record in records]
    assert len(shares) == 2 and shares[0] != shares[1]
    assert (raised - plain).item() == pytest.approx(3.0 * sum(shares) / 2, rel=1e-4)


def test_a_forward_called_without_hooks_is_the_same() -> None:
    """Adapters call `forward` of what they wrap."""
    model = skimming(skim_weight=2.0).train()
    assert torch.equal(
        model.forward(**padded_inputs(), labels=LABELS).loss, model(**padded_inputs(), labels=LABELS).loss
    )
    with pytest.raises(ValueError, match="output_hidden_states=True: a skimming model has no per-layer states"):
        model.forward(**padded_inputs(), output_hidden_states=True)
    with pytest.raises(ValueError, match="output_attentions=True"):
        model.bert(**padded_inputs(), output_attentions=True)


# ---- Mixed precision, which wraps a forward ----


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    return accelerator.prepare_model(model)


@pytest.fixture
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})


def test_a_copy_of_a_model_that_was_prepared_runs_itself(fresh_state: None) -> None:
    model = prepared(skimming())
    assert model.eval()(**padded_inputs()).logits.dtype == torch.float32
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.classifier.bias += 5
    twin.skimming.config.threshold = 0.9
    for kind in (model, twin):
        kind.eval()
    apart = twin(**padded_inputs()).logits - model(**padded_inputs()).logits
    assert apart.min() > 1 and model.skimming.config.threshold == 0.5
    assert twin.forward.__self__ is twin


def test_mixed_precision_is_prepared_again(fresh_state: None) -> None:
    """A fine-tune made dense in mixed precision goes on skimming in it, and dense again."""
    model, seen = prepared(no_dropout(tiny("bert", "sequence"))), []

    def dtypes(module: Any, args: Any, output: Tensor) -> None:
        seen.append(output.dtype)

    model.bert.pooler.dense.register_forward_hook(dtypes)
    for change in (add_skimming, remove_skimming):
        change(model)
        prepared(model)
        model.train()(**padded_inputs())
        assert seen.pop() == torch.bfloat16


def test_unwrapping_gives_a_forward_that_runs(fresh_state: None) -> None:
    model = prepared(skimming())
    plain = skimming().eval()(**padded_inputs()).logits
    unwrapped = Accelerator(cpu=True).unwrap_model(model, keep_fp32_wrapper=False)
    assert relative_error(unwrapped.eval()(**padded_inputs()).logits, plain) < 1e-6


# ---- Trainers ----


def test_an_interrupted_ramp_is_not_the_next_runs_aim(tmp_path: Path) -> None:
    model = skimming(skim_weight=3.0, noise=0.5)
    job = trainer_of(model, tmp_path, skim_ramp=0.9, noise_decay=0.9)
    job.args.max_steps = 10

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        assert model.skimming.config.skim_weight == 0.0
        raise KeyboardInterrupt

    job.training_step = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        job.train()
    assert (model.skimming.config.skim_weight, model.skimming.config.noise) == (3.0, 0.5)


def test_predictors_are_a_group_of_whatever_optimizer_is_asked_for(tmp_path: Path) -> None:
    model = skimming()
    job = trainer_of(model, tmp_path, predictor_learning_rate=0.5)
    job.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.7})
    optimizer = job.create_optimizer()
    *others, predictors = optimizer.param_groups
    assert type(optimizer) is torch.optim.SGD and predictors["momentum"] == 0.7
    assert {group["lr"] for group in others} == {0.1} and predictors["lr"] == 0.5
    assert list(map(id, predictors["params"])) == list(map(id, model.skimming.predictors.parameters()))


def test_distillation_of_outputs_that_do_not_exclude_each_other() -> None:
    set_seed(0)
    student, teacher = torch.randn(2, 4, 3)
    apart = torch.nn.functional.mse_loss(student, teacher)
    assert torch.equal(distillation_loss(student, teacher, 2.0, "regression"), apart)
    wanted = torch.sigmoid(teacher / 2)
    reached = torch.sigmoid(student / 2)
    entropy = -(wanted * reached.log() + (1 - wanted) * (1 - reached).log()).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0, "multi_label_classification"), 4 * entropy)


# ---- Everything else that surrounds a model ----


def test_a_partly_frozen_encoder_in_eval_mode_gives_no_gradient_silently() -> None:
    model = skimming()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"call model\.train\(\)"):
        model.eval()(**padded_inputs(), labels=LABELS).loss.backward()


def test_a_dense_model_from_a_skimming_models_config_reads_its_mask() -> None:
    config = config_of("bert")
    dense = BertModel(config).eval()
    lengths = (4, 2, 3, 4)  # as many texts as places: a mask of the wrong shape would fit
    wanted = dense(**padded_inputs(lengths)).last_hidden_state
    add_skimming(BertModel(config))
    found = dense(**padded_inputs(lengths)).last_hidden_state
    real = padded_inputs(lengths)["attention_mask"].bool()
    assert relative_error(found[real], wanted[real]) < 1e-6


def test_a_new_head_is_mentioned(tmp_path: Path) -> None:
    skimming(None).save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"has no fitting classifier\.bias, classifier\.weight, which are new: train them"
    ):
        from_pretrained(tmp_path, HEADS["sequence"])


def test_a_head_of_another_size_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skimming("sequence").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        from_pretrained(tmp_path, HEADS["sequence"], num_labels=5)
    assert "LOAD REPORT" in caplog.text
    with pytest.warns(UserWarning, match=r"has no fitting classifier\.bias, classifier\.weight, which are new"):
        from_pretrained(tmp_path, HEADS["sequence"], num_labels=5, ignore_mismatched_sizes=True)


def test_costs_of_groups_of_several_layers() -> None:
    model = add_skimming(tiny("albert", "sequence", inner_group_num=2))
    found, dense = evaluate(model, [padded_inputs()]), evaluate(remove_skimming(model), [padded_inputs()])
    assert len(found.tokens_kept_by_layer) == len(dense.tokens_kept_by_layer) == 6


def test_costs_of_multiple_choice() -> None:
    model = skimming("choice")
    batch = padded_inputs(choices=2)
    found = evaluate(model, [batch])
    assert found.lengths.tolist() == [9, 1, 14, 5] and found.layer_lengths.shape == (3, 4)
    model.skimming.enabled = False
    dense = evaluate(remove_skimming(model), [batch])
    assert dense.lengths.tolist() == [9, 1, 14, 5] and dense.flops_speedup == 1.0


def test_states_that_no_batch_has_are_missed(tmp_path: Path) -> None:
    trainer._warn_of_no_states.cache_clear()
    model = skimming().train()
    job = trainer_of(model, tmp_path, state_distillation_weight=5.0)
    with pytest.warns(UserWarning, match="state_distillation_weight: is set, but batches have no 'teacher_states'"):
        job.compute_loss(model, {**padded_inputs(), "labels": LABELS})
