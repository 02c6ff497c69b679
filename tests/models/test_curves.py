"""What `SkimTrainer` logs besides the loss, where it is kept, and that other steps record nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ProgressCallback
from transkimmer import SkimConfig, add_skimming, record_skimming
from transkimmer.skimming import skimming_of
from transkimmer.training import SkimTrainer, SkimTrainingArguments
from transkimmer.training.curves import ShortProgress, SkimCurves, kept_by_threshold
from transkimmer.training.stages import logged

from .tiny import LAYERS, no_dropout, padded_inputs, tiny, undecided_predictors

LENGTHS = (9, 1, 14, 5)
pytestmark = pytest.mark.default_kernels("what is logged does not depend on the kernels")


class _Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The rows of `padded_inputs`, over and over."""

    def __init__(self) -> None:
        self.inputs = padded_inputs(LENGTHS)

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index % 4] for key, value in self.inputs.items()} | {"labels": torch.tensor(index % 2)}


def trainer(folder: Path, **options: Any) -> SkimTrainer:
    model = add_skimming(no_dropout(tiny("bert", "sequence")), SkimConfig(skim_weight=0.25))
    undecided_predictors(model)
    settings: dict[str, Any] = dict(max_steps=4, logging_steps=2, report_to=[], save_strategy="no", skim_ramp=0.0)
    settings |= dict(per_device_train_batch_size=4, use_cpu=True, learning_rate=1e-5) | options
    arguments = SkimTrainingArguments(output_dir=str(folder), **settings)
    return SkimTrainer(model=model, args=arguments, train_dataset=_Rows())


def test_the_steps_that_are_logged_carry_the_curves(tmp_path: Path) -> None:
    job = trainer(tmp_path, gradient_accumulation_steps=2)
    seen: list[int] = []
    add = job.curves.add
    job.curves.add = lambda step, *rest: (seen.append(step), add(step, *rest))[1]  # type: ignore[method-assign]
    job.train()
    assert seen == [2, 2, 4, 4]  # both micro-batches of the steps that are logged, and no other
    job.save_state()
    steps = [step for step in logged(tmp_path) if "loss" in step]
    assert [step["step"] for step in steps] == [2, 4]
    assert steps == [step for step in json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]][:2]
    for step in steps:
        assert step["skim_weight"] == 0.25
        for rule in ("drawn", "threshold"):
            shares = [step[f"keep_{rule}/layer_{layer:02d}"] for layer in range(LAYERS)]
            assert shares == sorted(shares, reverse=True) and 0 < shares[-1] < shares[0] <= 1
            assert step[f"tokens_kept_{rule}"] == pytest.approx(sum(shares) / LAYERS)
        assert step["task_loss"] > 0


def test_a_target_falls_to_its_value_instead_of_the_weight_rising(tmp_path: Path) -> None:
    job = trainer(tmp_path, skim_ramp=1.0, logging_steps=1)
    config = skimming_of(job.model).config
    config.skim_target = 0.5
    job = SkimTrainer(model=job.model, args=job.args, train_dataset=job.train_dataset)
    job.train()
    steps = job.state.log_history[:-1]
    assert [step["skim_target"] for step in steps] == [1.0, 0.875, 0.75, 0.625] and config.skim_target == 0.5
    for step in steps:
        above = max(0.0, step["skim_loss"] - step["skim_target"])
        assert step["skim_weight"] == 0.25 and step["loss"] == pytest.approx(step["task_loss"] + 0.25 * above, rel=1e-4)


def test_the_noise_falls_over_the_last_steps_and_the_model_keeps_its_own(tmp_path: Path) -> None:
    job = trainer(tmp_path, noise_decay=0.5, logging_steps=1, max_steps=6)
    job.train()
    steps = job.state.log_history[:-1]
    assert [step["noise"] for step in steps] == pytest.approx([1, 1, 1, 2 / 3, 1 / 3, 0])
    # Without noise, what was drawn is what the threshold decides.
    layers = [f"layer_{layer:02d}" for layer in range(LAYERS)]
    apart = [max(abs(step[f"keep_drawn/{name}"] - step[f"keep_threshold/{name}"]) for name in layers) for step in steps]
    assert apart[-1] == 0 and apart[0] > 0
    assert skimming_of(job.model).config.noise == 1


def test_task_and_skim_loss_add_up_to_the_loss(tmp_path: Path) -> None:
    job = trainer(tmp_path, logging_steps=1)
    job.train()
    for step in job.state.log_history[:-1]:
        assert step["loss"] == pytest.approx(step["task_loss"] + 0.25 * step["skim_loss"], rel=1e-4)
        assert step["skim_loss"] == pytest.approx(step["tokens_kept_drawn"], rel=1e-5)


def test_thresholded_shares_are_what_inference_keeps_with_the_same_logits() -> None:
    """The logits of a layer depend on what was drawn before it: only of the first are they those of inference."""
    model = add_skimming(no_dropout(tiny("bert", "sequence")))
    undecided_predictors(model)
    inputs = padded_inputs(LENGTHS)
    with record_skimming() as training:
        model.train()(**inputs)
    with record_skimming() as inference, torch.no_grad():
        model.eval()(**inputs)
    record = training[0]
    assert kept_by_threshold(record, 0.0)[0] == inference[0].layer_lengths[0].sum()
    assert kept_by_threshold(record, 1e9).tolist() == [4] * LAYERS  # the first tokens
    assert kept_by_threshold(record, -1e9).tolist() == [29] * LAYERS
    curves = SkimCurves()
    curves.add(1, record, {}, SkimConfig())
    assert [logit.numel() for logit in curves.logits()] == [25] * LAYERS


def test_in_pruned_training_the_threshold_is_not_guessed_at() -> None:
    """What it would have kept of the tokens that a draw has removed, nobody knows."""
    model = add_skimming(no_dropout(tiny("bert", "sequence")), SkimConfig(pruned_training=True))
    undecided_predictors(model)
    torch.manual_seed(0)
    with record_skimming() as records:
        model.train()(**padded_inputs(LENGTHS))
    curves = SkimCurves()
    curves.add(1, records[0], {}, SkimConfig())
    reached = [29, *records[0].layer_lengths.sum(1).tolist()[:-1]]
    assert reached[-1] < reached[1] < 29
    assert [logit.numel() for logit in curves.logits()] == [count - 4 for count in reached]
    found = curves.scalars(0.0)
    assert "tokens_kept_drawn" in found and "tokens_kept_threshold" not in found and "task_loss" not in found


def test_histograms_in_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, EventAccumulator

    job = trainer(tmp_path, report_to=["tensorboard"])
    job.train()
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file), size_guidance={HISTOGRAMS: 0}).Reload()
    scalars = {event.step: event.value for event in events.Scalars("train/keep_drawn/layer_01")}
    assert scalars == pytest.approx({s["step"]: s["keep_drawn/layer_01"] for s in job.state.log_history[:-1]})
    assert sorted(events.Tags()["histograms"]) == [f"delta/layer_{layer:02d}" for layer in range(LAYERS)]
    for layer, logits in enumerate(job.curves.logits()):
        first, last = events.Histograms(f"delta/layer_{layer:02d}")
        assert (first.step, last.step) == (2, 4)
        histogram = last.histogram_value
        assert histogram.num == logits.numel() > 0
        assert (histogram.min, histogram.max) == pytest.approx((logits.min().item(), logits.max().item()))


def test_the_progress_bar_prints_nothing_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = trainer(tmp_path)
    shown = [callback for callback in job.callback_handler.callbacks if isinstance(callback, ProgressCallback)]
    assert [type(callback) for callback in shown] == [ShortProgress]
    job.train()
    printed = capsys.readouterr().out
    assert "tokens_kept_drawn" in printed and "layer_" not in printed


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"logging_strategy": "no"}, []),
        ({"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}, [8]),
        ({"logging_steps": 3, "logging_first_step": True}, [1, 3]),
    ],
)
def test_whenever_trainer_logs(tmp_path: Path, options: dict[str, Any], steps: list[int]) -> None:
    job = trainer(tmp_path, disable_tqdm=True, **options)
    job.train()
    assert [step["step"] for step in job.state.log_history if "tokens_kept_drawn" in step] == steps
