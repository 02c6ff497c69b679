"""What tells kinds of tasks apart in training and evaluation: head, inputs, and what counts as right."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data import Features, TokenizedExamples, padded_batches
from ..loading import from_pretrained
from ..skimming import CONFIG_KEY
from ..tasks import QuestionTask, Task, TextTask
from ..windows import QuestionWindows
from .evaluation import evaluate
from .judges import ClassJudge, Judge, SpanJudge

# Key of config.json under which a model for questions that may have no answer keeps `SpanJudge`'s threshold.
NO_ANSWER_THRESHOLD = "no_answer_threshold"


@dataclass(frozen=True)
class Rows:
    """Rows as a model reads them, and in batches."""

    features: Features
    batches: list[dict[str, Tensor]]


class Kind(ABC):
    """One kind of task; `kind_of` has the one that a task is of."""

    task: Task
    auto_class: ClassVar[Any]
    head: ClassVar[str]  # what names of model classes with that head end in

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Of the head."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the outputs, in their order, where they have names."""
        return ()

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Of `from_pretrained`, for a new head on a backbone."""

    @abstractmethod
    def features(self, rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Features:
        """Rows of `load_split` as a model reads them."""

    @abstractmethod
    def judge(self, features: Features, model: PreTrainedModel) -> Judge: ...

    def fit(self, model: PreTrainedModel, held_out: Rows) -> dict[str, float]:
        """Sets on held-out rows what answers depend on beside the weights; returns what is to be known of it."""
        return {}

    def rows(self, rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int, batch_size: int) -> Rows:
        features = self.features(rows, tokenizer, max_length)
        return Rows(features, list(padded_batches(features, tokenizer, batch_size, sort=True)))

    def load(self, folder: Path, argument: str, kernels: str = "auto") -> PreTrainedModel:
        """A trained model for the task, dense or skimming, in eval mode.

        Raises:
            ValueError: it has another head, another number of outputs, or the task's classes in another order; names
                `argument`.
        """
        config = AutoConfig.from_pretrained(folder)
        for name in config.architectures or ():
            if not name.endswith(self.head):
                raise ValueError(f"{argument} {folder}: is a {name}, {self.task.title} needs a model {self.head}")
        if config.num_labels != self.outputs:
            raise ValueError(
                f"{argument} {folder}: has {config.num_labels} outputs, {self.task.title} has {self.outputs}"
            )
        named = [str(name) for _, name in sorted(config.id2label.items())]
        found, wanted = (list(map(_plain, names)) for names in (named, self.classes))
        if found != wanted and sorted(found) == sorted(wanted):  # other names, LABEL_0 above all, say nothing
            raise ValueError(
                f"{argument} {folder}: its classes are {', '.join(named)}; the order must be that of "
                f"{self.task.title}: {', '.join(self.classes)}"
            )
        if hasattr(config, CONFIG_KEY):
            return from_pretrained(folder, self.auto_class, kernels=kernels)
        return self.auto_class.from_pretrained(folder).eval()


@dataclass(frozen=True)
class TextKind(Kind):
    """Classification or regression of a text or a pair of them."""

    task: TextTask
    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    head: ClassVar[str] = "ForSequenceClassification"

    @property
    def outputs(self) -> int:
        return self.task.outputs

    @property
    def classes(self) -> tuple[str, ...]:
        return self.task.classes

    def options(self) -> dict[str, Any]:
        names = dict(enumerate(self.task.classes)) or {0: "score"}
        return {
            "num_labels": self.task.outputs,
            "id2label": names,
            "label2id": {name: number for number, name in names.items()},
            "problem_type": "regression" if self.task.is_regression else "single_label_classification",
        }

    def features(self, rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Features:
        return TokenizedExamples(rows, tokenizer, max_length)

    def judge(self, features: Features, model: PreTrainedModel) -> Judge:
        return ClassJudge(self.task.metrics)


@dataclass(frozen=True)
class QuestionKind(Kind):
    """Extractive question answering; `doc_stride` as in `QuestionWindows`."""

    task: QuestionTask
    doc_stride: int
    auto_class: ClassVar[Any] = AutoModelForQuestionAnswering
    head: ClassVar[str] = "ForQuestionAnswering"

    @property
    def outputs(self) -> int:
        return 2

    def options(self) -> dict[str, Any]:
        return {"num_labels": self.outputs}

    def features(self, rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> QuestionWindows:
        return QuestionWindows(rows, tokenizer, max_length, self.doc_stride)

    def judge(self, features: Features, model: PreTrainedModel) -> SpanJudge:
        assert isinstance(features, QuestionWindows)
        threshold = getattr(model.config, NO_ANSWER_THRESHOLD, 0.0)
        return SpanJudge(features, unanswerable=self.task.has_unanswerable, threshold=threshold)

    def fit(self, model: PreTrainedModel, held_out: Rows) -> dict[str, float]:
        """From which difference of scores on a question counts as one without answer."""
        if not self.task.has_unanswerable:
            return {}
        judge = self.judge(held_out.features, model)
        evaluate(model, held_out.batches, judge)
        threshold = judge.best_threshold()
        setattr(model.config, NO_ANSWER_THRESHOLD, threshold)
        return {NO_ANSWER_THRESHOLD: threshold}


def _plain(name: str) -> str:
    """Letters and digits of a class's name: models differ in how they write the rest."""
    return re.sub(r"[\W_]", "", name).lower()


def kind_of(task: Task, doc_stride: int | None = None) -> Kind:
    """The task's kind; `doc_stride` None: the task's own."""
    if isinstance(task, QuestionTask):
        return QuestionKind(task, task.doc_stride if doc_stride is None else doc_stride)
    assert isinstance(task, TextTask)
    return TextKind(task)
