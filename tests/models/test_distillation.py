"""Distillation: what a teacher makes of its examples, and what `SkimTrainer` makes of that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transkimmer import SkimConfig, add_skimming
from transkimmer.data import Example, TokenizedExamples
from transkimmer.training import SkimTrainer, SkimTrainingArguments
from transkimmer.training.run import lessons_of
from transkimmer.training.trainer import TEACHER_LOGITS, TEACHER_STATES

from .tiny import ARCHITECTURES, no_dropout, padded_inputs, tiny
from .words import word_tokenizer

pytestmark = pytest.mark.default_kernels("losses around a model do not depend on the kernels")
LABELS = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize("side", ["right", "left"])
def test_lessons_are_in_the_order_of_the_examples_and_free_of_padding(side: str) -> None:
    # RoBERTa counts positions from the first real token, so that padding in front changes no state.
    model, tokenizer = tiny("roberta", "sequence").eval(), word_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token_id = side, model.config.pad_token_id
    texts = ["dog runs happy cat", "dog", "cat sleeps"]
    examples = TokenizedExamples([Example(text, 0) for text in texts], tokenizer)
    logits, states = lessons_of(model, examples, tokenizer)
    for text, row, state in zip(texts, logits, states, strict=True):
        alone = tokenizer(text, return_tensors="pt")
        torch.testing.assert_close(state, model.base_model(**alone).last_hidden_state[0, 0])
        if side == "right":  # a dense head reads padding where a sequence starts with it
            torch.testing.assert_close(row, model(**alone).logits[0])


def test_a_teacher_that_moves_can_be_trained_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A move to a GPU makes new tensors, which would be good for nothing else if they were made in inference mode."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module._apply(torch.clone))
    model, tokenizer = tiny("bert", "sequence").eval(), word_tokenizer()
    lessons_of(model, TokenizedExamples([Example("dog runs", 0)], tokenizer), tokenizer)
    assert not any(x.is_inference() for x in (*model.parameters(), *model.buffers()))
    model(**padded_inputs(), labels=LABELS).loss.backward()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_state_is_held_to_the_teachers(tmp_path: Path, architecture: str) -> None:
    """A student that skims nothing is its own teacher; half a unit apart in every place costs a quarter."""
    model = add_skimming(no_dropout(tiny(architecture, "sequence")), SkimConfig(bias_init=50.0, skim_weight=0.0))
    arguments = SkimTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], distillation_weight=0.0)
    arguments.state_distillation_weight = 3.0
    job = SkimTrainer(model=model, args=arguments)
    inputs = {**padded_inputs(), "labels": LABELS}
    states = model.eval().base_model(**padded_inputs()).last_hidden_state[:, 0].detach()
    model.train()
    plain = job.compute_loss(model, dict(inputs)).item()
    for apart, cost in ((0.0, 0.0), (0.5, 0.75)):
        lessons = {TEACHER_STATES: states + apart, TEACHER_LOGITS: torch.zeros(4, 2)}
        assert job.compute_loss(model, inputs | lessons).item() == pytest.approx(plain + cost, abs=1e-4)
    loss = job.compute_loss(model, inputs | lessons)
    loss.backward()
    assert all(layer.grad is not None for layer in model.skimming.predictors[0].parameters())


def test_a_weight_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"state_distillation_weight=-1: must lie between"):
        SkimTrainingArguments(output_dir=str(tmp_path), use_cpu=True, state_distillation_weight=-1)
