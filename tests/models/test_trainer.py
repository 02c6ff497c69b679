"""`SteadyTrainer` and `SkimTrainer`: what of Hugging Face's `Trainer` they set right."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments
from transkimmer import SkimConfig, add_skimming
from transkimmer.outputs import in_order
from transkimmer.training import SkimTrainer, SkimTrainingArguments, SteadyTrainer

from .tiny import no_dropout, padded_inputs, tiny

pytestmark = pytest.mark.default_kernels("is about steps of training, and not about kernels")


def rows() -> list[dict[str, Any]]:
    inputs = padded_inputs((9, 9, 9, 9))
    return [{**{name: x[i] for name, x in inputs.items()}, "labels": i % 2} for i in range(4)]


def arguments(kind: type, folder: Path, **options: Any) -> TrainingArguments:
    quiet = {"use_cpu": True, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "max_steps": 1}
    return kind(output_dir=str(folder), **quiet, **options)


@pytest.mark.parametrize("kind", [SteadyTrainer, Trainer], ids=["dense", "skimming, by a plain Trainer"])
def test_accumulated_batches_weigh_as_much_as_one(kind: type[Trainer], tmp_path: Path) -> None:
    """`Trainer` would take the heads' loss, a mean over a batch, for a sum that is yet to be divided."""

    def start() -> PreTrainedModel:
        model = no_dropout(tiny("bert", "sequence"))
        return model if kind is SteadyTrainer else add_skimming(model, SkimConfig(noise=0.0))

    weights = []
    torch.manual_seed(0)
    before = start()
    for size, accumulated in ((4, 1), (2, 2)):
        model = start()
        model.load_state_dict(before.state_dict())
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        how = arguments(TrainingArguments, tmp_path, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, **options)
        kind(model=model, args=how, train_dataset=rows()).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    moved = (weights[0] - torch.cat([p.detach().flatten() for p in before.parameters()])).abs().max()
    assert moved > 1e-3 and (weights[0] - weights[1]).abs().max() < 1e-3 * moved


@pytest.mark.parametrize("column", ["teacher_logits", "teacher_states"])
def test_a_teachers_columns_are_not_unused(tmp_path: Path, column: str) -> None:
    losses = []
    for lesson in (0.0, 5.0):
        torch.manual_seed(0)
        model = no_dropout(add_skimming(tiny("bert", "sequence"), SkimConfig(noise=0.0)))
        size = 2 if column == "teacher_logits" else 64
        taught = [{**row, column: [lesson, *[0.0] * (size - 1)]} for row in rows()]
        how = arguments(SkimTrainingArguments, tmp_path, state_distillation_weight=1.0, logging_steps=1)
        assert how.remove_unused_columns
        trainer = SkimTrainer(model=model, args=how, train_dataset=taught)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_the_sampler_of_lengths_is_told_its_epoch(tmp_path: Path) -> None:
    how = arguments(TrainingArguments, tmp_path, train_sampling_strategy="group_by_length")
    trainer = SteadyTrainer(model=tiny("bert", "sequence"), args=how, train_dataset=rows())
    sampler = trainer._get_train_sampler(trainer.train_dataset)
    orders = []
    for epoch in (0, 1.5, 2.0, 1.0):
        state = TrainerState(epoch=epoch)
        trainer.callback_handler.on_epoch_begin(how, state, TrainerControl())
        assert sampler.epoch == int(epoch)
        orders.append(tuple(sampler))
    assert orders[1] == orders[3] and len(set(orders)) > 1


def test_batches_are_drawn_from_the_seed(tmp_path: Path) -> None:
    many = [{**row, "labels": 0} for row in rows() for _ in range(16)]

    def order(**options: Any) -> list[int]:
        how = arguments(TrainingArguments, tmp_path, train_sampling_strategy="group_by_length", **options)
        trainer = SteadyTrainer(model=tiny("bert", "sequence"), args=how, train_dataset=many)
        return list(trainer._get_train_sampler(trainer.train_dataset))

    assert order(seed=1) == order(seed=1) != order(seed=2)
    assert order(seed=1, data_seed=3) == order(seed=2, data_seed=3) != order(seed=1)
    assert sorted(order(seed=1)) == list(range(64))


def test_replicas_are_put_together_by_device() -> None:
    parts: list[Any] = [SimpleNamespace(device=torch.device("cuda", index)) for index in (2, 0, 1)]
    assert [part.device.index for part in in_order(parts)] == [0, 1, 2]
    one: list[Any] = [SimpleNamespace(device=torch.device("cpu"))]
    assert in_order(one) == one


NUMBERS = ("predictor_learning_rate", "skim_ramp", "noise_decay", "distillation_weight", "state_distillation_weight")
NUMBERS += ("distillation_temperature",)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_none_are_named(tmp_path: Path, name: str) -> None:
    """YAML reads 1e-3 as a string; Hugging Face converts none of its own, and neither do we."""
    assert arguments(TrainingArguments, tmp_path, learning_rate="1e-3").learning_rate == "1e-3"
    must = r"must be a number and (lie between|be > 0)"
    for value in ("1e-3", "much", None, True, [0.5]):
        hint = r" \(YAML reads 1e-3 as a string, 1\.0e-3 as a number\)" if isinstance(value, str) else ""
        wanted = rf"^{name}={re.escape(repr(value))}: {must}.*, got {type(value).__name__}{hint}$"
        with pytest.raises(TypeError, match=wanted):
            arguments(SkimTrainingArguments, tmp_path, **{name: value})
    for value in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^{name}={value}: must (lie between|be > 0)"):
            arguments(SkimTrainingArguments, tmp_path, **{name: value})
    for number in (1, 0.5, np.float32(0.5)):
        assert getattr(arguments(SkimTrainingArguments, tmp_path, **{name: number}), name) == number
