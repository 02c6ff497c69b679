"""Training: the skim loss, its gradients, Hugging Face's Trainer and ours."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed
from transkimmer import SkimConfig, add_skimming, record_skimming
from transkimmer.predictor import KEEP
from transkimmer.training import (
    SkimTrainer,
    SkimTrainingArguments,
    calibrate,
    evaluate,
    evaluate_classifier,
    training_forward_difference,
)
from transkimmer.training.trainer import TEACHER_LOGITS, distillation_loss

from ..target import Recorder
from .tiny import ARCHITECTURES, KERNELS, no_dropout, padded_inputs, relative_error, tiny, undecided_predictors

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
LABELS = torch.tensor([0, 1, 1, 0])
CALIBRATES = (
    "calibration evaluates dozens of times, which takes Triton's interpreter a minute; another test does it there"
)


@every_architecture
def test_the_skim_loss_is_part_of_the_loss(architecture: str) -> None:
    model = add_skimming(tiny(architecture, "sequence"), SkimConfig(skim_weight=0.25)).train()
    undecided_predictors(model)
    set_seed(0)
    with record_skimming() as records:
        loss = model(**padded_inputs(), labels=LABELS).loss
    model.skimming.config.skim_weight = 0.0
    set_seed(0)
    task = model(**padded_inputs(), labels=LABELS).loss
    assert loss.item() == pytest.approx(task.item() + 0.25 * records[0].skim_loss.item(), rel=1e-5)
    set_seed(0)
    model.skimming.config.skim_weight = 0.25
    as_tuple = model(**padded_inputs(), labels=LABELS, return_dict=False)
    assert as_tuple[0].item() == pytest.approx(loss.item(), rel=1e-5)
    judged = model.eval()(**padded_inputs(), labels=LABELS)
    assert judged.loss.item() == pytest.approx(F.cross_entropy(judged.logits, LABELS).item(), rel=1e-6)


def test_the_skim_loss_costs_nothing_up_to_its_target() -> None:
    model = add_skimming(tiny("bert", "sequence"), SkimConfig(skim_weight=0.0)).train()
    undecided_predictors(model)

    def loss(weight: float, target: float) -> Tensor:
        model.skimming.config.skim_weight, model.skimming.config.skim_target = weight, target
        set_seed(0)
        return model(**padded_inputs(), labels=LABELS).loss

    with record_skimming() as records:
        task = loss(0.0, 0.0).item()
    share = records[0].skim_loss.item()
    assert loss(4.0, share - 0.1).item() == pytest.approx(task + 0.4, rel=1e-4)
    assert loss(4.0, share + 0.1).item() == task
    last = model.skimming.predictors[0].out.bias
    for target, heard in ((share - 0.1, True), (share + 0.1, False)):
        model.zero_grad()
        (loss(4.0, target) - loss(0.0, 0.0)).backward()
        assert (float(last.grad.abs().max()) > 1e-6) is heard


@every_architecture
def test_the_skim_loss_counts_real_tokens(architecture: str) -> None:
    """Mean over layers of the share of real tokens kept, padding counted nowhere."""
    model = add_skimming(tiny(architecture)).train()
    undecided_predictors(model)
    inputs = padded_inputs()
    with record_skimming() as records:
        model(**inputs)
    record = records[0]
    share = record.layer_lengths.sum(1) / inputs["attention_mask"].sum()
    assert record.skim_loss.item() == pytest.approx(share.mean().item(), rel=1e-5)


@every_architecture
def test_every_parameter_gets_a_gradient(architecture: str) -> None:
    model = add_skimming(tiny(architecture, "token")).train()
    undecided_predictors(model)
    labels = padded_inputs()["input_ids"] % 2
    model(**padded_inputs(), labels=labels).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_architecture
def test_all_kernels_train_like_the_reference(architecture: str) -> None:
    gradients = []
    for kernels in (KERNELS[-1], "reference"):
        model = add_skimming(tiny(architecture, "sequence"), kernels=kernels).train()
        undecided_predictors(model)
        set_seed(3)
        with Recorder() as ran:
            model(**padded_inputs(), labels=LABELS).loss.backward()
        names = [
            "compact",
            *(f"{name}{way}" for name in ("ragged_attention", "choose_rows") for way in ("", "_backward")),
        ]
        if kernels == "triton":  # elsewhere it would be what the modules do
            names += ["add_norm", "add_norm_backward"]
        assert {(name, backend) for name, backend, _ in ran.calls} == {(name, kernels) for name in names}
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative_error(*gradients) <= 1e-4


@every_architecture
def test_dropout_is_that_of_the_dense_model(architecture: str) -> None:
    """Of hidden states; of attention probabilities it is not applied. Unpadded, both draw in the same order."""
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    if architecture == "distilbert":
        names = ("dropout", "attention_dropout")
    inputs, outputs = padded_inputs((9, 9, 9)), []
    dense = tiny(architecture, **dict(zip(names, (0.3, 0.0), strict=True)))
    ours = add_skimming(tiny(architecture, **dict(zip(names, (0.3, 0.9), strict=True))))
    ours.skimming.enabled = False
    for model in (dense.train(), ours.train()):
        set_seed(5)
        outputs.append(model(**inputs).last_hidden_state.detach())
    assert relative_error(outputs[1], outputs[0]) <= 1e-5
    with torch.no_grad():
        assert relative_error(ours.eval()(**inputs).last_hidden_state, outputs[0]) > 0.1


def test_a_norm_with_a_hook_is_called() -> None:
    """No kernel takes its place, in the layers or in the predictors."""
    model, seen = add_skimming(tiny("bert", "sequence")).train(), []
    norms = (model.bert.encoder.layer[0].output.LayerNorm, model.skimming.predictors[1].norm2)
    for norm in norms:
        norm.register_forward_hook(lambda module, args, output: seen.append(module))
    model(**padded_inputs(), labels=LABELS).loss.backward()
    assert {*seen} == {*norms}


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = add_skimming(tiny("bert", "sequence")).train()
        undecided_predictors(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        set_seed(3)
        model(**padded_inputs(), labels=LABELS).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative_error(*gradients) <= 1e-5


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
def test_inference_sees_the_optimizers_steps(options: dict[str, bool]) -> None:
    """Also those of the fused optimizer, Trainer's default, which does not bump the parameters' version counters."""
    model = add_skimming(tiny("bert", "sequence"))
    with torch.no_grad():
        before = model(**padded_inputs()).logits
    model.train()(**padded_inputs(), labels=LABELS).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.01, **options).step()
    with torch.no_grad():
        after = model.eval()(**padded_inputs()).logits
        model.skimming.refresh()
        assert torch.equal(after, model(**padded_inputs()).logits)
    assert not torch.allclose(after, before, atol=1e-3)


class _KeywordTask(Dataset):
    """Class 1 iff token 7 occurs: most tokens are of no use to it."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(10, 100, (count, 12), generator=generator)
        self.ids[:, 0] = 2
        self.labels = torch.arange(count) % 2
        place = torch.randint(1, 12, (count,), generator=generator)
        self.ids[self.labels == 1, place[self.labels == 1]] = 7

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[index]}


def _arguments(cls: type, folder: Path, **options: object) -> TrainingArguments:
    return cls(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=32,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )


@pytest.mark.default_kernels("training steps of 32 sentences take minutes in Triton's interpreter")
def test_a_plain_trainer_trains_a_skimming_model(tmp_path: Path) -> None:
    model = add_skimming(tiny("bert", "sequence", initializer_range=0.05))
    before = model.skimming.predictors[0].fc.weight.clone()
    arguments = _arguments(TrainingArguments, tmp_path, max_steps=3, learning_rate=1e-3)
    Trainer(model=model, args=arguments, train_dataset=_KeywordTask(96)).train()
    assert not torch.equal(model.skimming.predictors[0].fc.weight, before)


@pytest.mark.default_kernels("hundreds of training steps take an hour in Triton's interpreter")
def test_training_learns_what_to_skim(tmp_path: Path) -> None:
    """On a task that hangs on one word, the model must solve it and still skim most tokens."""
    set_seed(0)
    model = tiny("bert", "sequence", initializer_range=0.05)
    task = _KeywordTask(1024)
    options = dict(max_steps=250, learning_rate=1e-3, warmup_steps=20)
    Trainer(model=model, args=_arguments(TrainingArguments, tmp_path, **options), train_dataset=task).train()
    add_skimming(model, SkimConfig(skim_weight=0.5, bias_init=2.0))
    options = dict(max_steps=200, learning_rate=3e-4, predictor_learning_rate=3e-3, skim_ramp=0.5)
    arguments = _arguments(SkimTrainingArguments, tmp_path, **options)
    SkimTrainer(model=model, args=arguments, train_dataset=task).train()
    assert model.skimming.config.skim_weight == 0.5
    rows = [task[i] for i in range(len(task))]
    batches = [{key: torch.stack([row[key] for row in rows]) for key in rows[0]}]
    result = evaluate_classifier(model, batches)
    assert result.accuracy > 0.95
    assert result.tokens_kept < 0.6
    assert result.flops_speedup > 1.4
    assert result.tokens_kept_by_layer == sorted(result.tokens_kept_by_layer, reverse=True)


def test_calibration_reaches_the_wanted_speedup() -> None:
    model = add_skimming(tiny("bert", "sequence")).eval()
    undecided_predictors(model)
    batches = [{**padded_inputs(), "labels": LABELS}]
    before = evaluate_classifier(model, batches)
    wanted = before.flops_speedup * 1.15
    shift = calibrate(model, batches, wanted)
    assert shift < 0
    assert model.skimming.config.threshold == 0.5  # the decision is still the argmax
    after = evaluate_classifier(model, batches)
    assert after.flops_speedup >= wanted
    assert after.tokens_kept < before.tokens_kept
    # One step back skims too little.
    model.skimming.config.threshold = 1 / (1 + math.exp(0.06))
    assert evaluate_classifier(model, batches).flops_speedup < wanted


@pytest.mark.default_kernels(CALIBRATES)
def test_calibration_starts_from_the_models_own_threshold() -> None:
    model = add_skimming(tiny("bert", "sequence"), SkimConfig(threshold=0.8)).eval()
    undecided_predictors(model)
    batches = [padded_inputs()]
    wanted = evaluate(model, batches).flops_speedup * 1.1
    assert calibrate(model, batches, wanted) < 0
    assert wanted <= evaluate(model, batches).flops_speedup < 1.2 * wanted and model.skimming.config.threshold == 0.8


@pytest.mark.parametrize(("field", "value"), [("decision", "sample"), ("schedule", [1.0, 0.5, 0.5])])
def test_only_a_threshold_can_be_calibrated(field: str, value: object) -> None:
    model = add_skimming(tiny("bert", "sequence"), SkimConfig(**{field: value})).eval()
    with pytest.raises(ValueError, match=rf"^model: its SkimConfig.{field} is .*only decisions by threshold"):
        calibrate(model, [{**padded_inputs(), "labels": LABELS}], 1.5)


@pytest.mark.default_kernels(CALIBRATES)
def test_calibration_refuses_what_it_cannot_aim_at() -> None:
    model, batch = add_skimming(tiny("bert", "sequence")).eval(), {**padded_inputs(), "labels": LABELS}
    undecided_predictors(model)
    for wanted in (0.5, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"^flops_speedup={wanted}: must be a finite number >= 1"):
            calibrate(model, [batch], wanted)
    with pytest.raises(TypeError, match=r"^batches: must be several of them"):
        calibrate(model, batch, 1.5)
    named = r"^batches: must be dicts with input_ids and attention_mask, got "
    for kind, wrong in (("tuple", tuple(batch.values())), ("list", [batch]), ("Tensor", batch["input_ids"])):
        with pytest.raises(TypeError, match=named + kind):
            calibrate(model, [batch, wrong], 1.5)
        for evaluation in (evaluate, evaluate_classifier, training_forward_difference):
            with pytest.raises(TypeError, match=named + kind):
                evaluation(model, [batch, wrong])
    assert model.skimming.config.threshold == 0.5 and not model.training
    wanted = evaluate_classifier(model, [batch]).flops_speedup * 1.1
    assert calibrate(copy.deepcopy(model), iter([batch]), wanted) == calibrate(model, [batch], wanted) < 0
    for predictor in model.skimming.predictors:
        torch.nn.init.constant_(predictor.out.bias[KEEP], -50)
    with pytest.raises(ValueError, match=r"flops_speedup=1.01: skims to .* at least; train with less skim weight"):
        calibrate(model, [batch], 1.01)


def test_calibration_that_cannot_reach_its_goal_changes_nothing() -> None:
    model = add_skimming(tiny("bert", "sequence")).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"flops_speedup=1000: skims to .* at most"):
        calibrate(model, [{**padded_inputs(), "labels": LABELS}], 1000)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.skimming.config.threshold == 0.5


@every_architecture
def test_every_parameter_is_in_one_group_of_the_optimizer(tmp_path: Path, architecture: str) -> None:
    model = add_skimming(tiny(architecture, "sequence"))
    rates = {"learning_rate": 1e-3, "predictor_learning_rate": 7e-3, "weight_decay": 0.1}
    arguments = _arguments(SkimTrainingArguments, tmp_path, **rates)
    groups = SkimTrainer(model=model, args=arguments).create_optimizer().param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1e-3, 0.0), (7e-3, 0.0)]
    decayed, plain, predictors = ([id(p) for p in group["params"]] for group in groups)
    assert sorted(predictors) == sorted(map(id, model.skimming.predictors.parameters()))
    assert sorted(decayed + plain + predictors) == sorted(map(id, model.parameters()))
    assert decayed and plain and all(p.dim() == 2 for p in groups[0]["params"])


def test_distillation_is_a_divergence_of_softened_predictions() -> None:
    """At temperature 2, 4 KL(0.8, 0.2 | 0.5, 0.5), mean over a row that costs so much and one that costs nothing."""
    student = torch.tensor([[1.0, 1.0], [3.0, 1.0]])
    teacher = torch.tensor([[2 * math.log(0.8), 2 * math.log(0.2)], [5.0, 3.0]])
    expected = 4 * (0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)) / 2
    for shape in ((2, 2), (1, 2, 2)):  # of classes; of an answer's start and end
        assert distillation_loss(student.view(shape), teacher.view(shape), 2.0).item() == pytest.approx(expected)
    numbers = student[:, :1], teacher[:, :1]
    assert torch.equal(distillation_loss(*numbers, 2.0), F.mse_loss(*numbers))


@pytest.mark.default_kernels("losses around a model do not depend on the kernels")
@pytest.mark.parametrize("labels", [LABELS, LABELS.float()], ids=["classes", "numbers"])
def test_a_teachers_logits_are_heard_by_their_weight(tmp_path: Path, labels: Tensor) -> None:
    outputs = 1 if labels.is_floating_point() else 2
    model = no_dropout(add_skimming(tiny("bert", "sequence", num_labels=outputs), SkimConfig(noise=0.0)))
    arguments = _arguments(SkimTrainingArguments, tmp_path, distillation_weight=3.0, distillation_temperature=4.0)
    job, inputs, teacher = SkimTrainer(model=model, args=arguments), padded_inputs(), torch.randn(4, outputs)
    for training, weight in ((True, 3.0), (False, 0.0)):
        model.train(training)
        plain, taught = (
            job.compute_loss(model, {**inputs, "labels": labels, **lessons})
            for lessons in ({}, {TEACHER_LOGITS: teacher})
        )
        apart = distillation_loss(model(**inputs, labels=labels).logits, teacher, 4.0)
        assert (taught - plain).item() == pytest.approx(weight * apart.item(), rel=1e-4)


def test_trainer_refuses_what_it_cannot_train(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no skimming"):
        SkimTrainer(model=tiny("bert", "sequence"), args=_arguments(SkimTrainingArguments, tmp_path))
    with pytest.raises(TypeError, match=r"^args: must be SkimTrainingArguments, got TrainingArguments"):
        SkimTrainer(model=add_skimming(tiny("bert", "sequence")), args=_arguments(TrainingArguments, tmp_path))
    with pytest.raises(ValueError, match=r"skim_ramp=2.0: must lie between"):
        _arguments(SkimTrainingArguments, tmp_path, skim_ramp=2.0)
    with pytest.raises(ValueError, match=r"noise_decay=-0.5: must lie between"):
        _arguments(SkimTrainingArguments, tmp_path, noise_decay=-0.5)
