"""Passages whose words are coloured by the layers that read them, the answer marked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures import layer_count
from ..bench import show
from ..records import record_skimming
from ..windows import Question, QuestionWindows
from .judges import Answer
from .kinds import QuestionKind

SHOWN = 2  # of the spans that come after the answer
_MARK = "underline on #fff3b0"


@dataclass(frozen=True)
class ReadPassage:
    """A passage as a model read it.

    Attributes:
        words: characters from the first up to the last one of each word or sign, and how many layers read it: as many
            as read any piece of it, in any window.
        answer: what the model answered; None: that there is no answer.
        next_best: other spans that scored high, best first.
    """

    question: Question
    words: list[tuple[int, int, int]]
    answer: Answer | None
    next_best: list[Answer]

    def answers(self) -> str:
        """`predicted: Paris; gold: Rome | in Rome`."""
        predicted = "no answer" if self.answer is None else self.answer.text
        return f"predicted: {predicted}; gold: {' | '.join(dict.fromkeys(self.question.answers)) or 'no answer'}"

    def shown_words(self) -> list[show.Word]:
        """Words as they are drawn."""
        ends = [-1, *(end for _, end, _ in self.words)]
        passage = self.question.passage
        return [
            show.Word(passage[start:end], depth, former != start)
            for former, (start, end, depth) in zip(ends, self.words, strict=False)
        ]

    def marked_words(self) -> list[int]:
        """Positions in `words` of those that the answer touches."""
        if self.answer is None:
            return []
        first, last = self.answer.start, self.answer.end
        return [place for place, (start, end, _) in enumerate(self.words) if start < last and end > first]


@torch.no_grad()
def read_passage(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: QuestionKind,
    question: Question,
    max_length: int = 384,
) -> ReadPassage:
    """Lets a skimming model, in eval mode, answer one question; `max_length` as in `QuestionWindows`."""
    rows = kind.rows([question], tokenizer, max_length, batch_size=32)
    windows = rows.features
    assert isinstance(windows, QuestionWindows)
    judge = kind.judge(windows, model)
    depths = [0] * len(question.passage)
    for batch in rows.batches:
        with record_skimming() as records:
            judge.see(batch, model(**{key: value.to(model.device) for key, value in batch.items() if key != "labels"}))
        read_by = records[0].keep_masks.sum(0)  # [windows, seq]
        for row, window in enumerate(batch["labels"].tolist()):
            first, last = windows.passages[window].tolist()
            for (start, end), depth in zip(windows.offsets[window].tolist(), read_by[row, first:last], strict=True):
                depths[start:end] = [max(former, int(depth)) for former in depths[start:end]]
    spans = (match.span() for match in re.finditer(r"\w+|[^\w\s]", question.passage))
    words = [(start, end, max(depths[start:end])) for start, end in spans]
    answer = judge.answer(0)
    others = [other for other in judge.n_best(0) if answer is None or other.text != answer.text]
    return ReadPassage(question, words, answer, others)


def print_passages(
    console: Console,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: QuestionKind,
    questions: Iterable[Question],
    max_length: int = 384,
) -> None:
    """Prints each question, its answer, the right ones and the next best, and the passage with the answer marked."""
    layers = layer_count(model.config)
    console.print(show.legend(layers).append("; the model's answer is ").append("marked", style=_MARK))
    for question in questions:
        found = read_passage(model, tokenizer, kind, question, max_length)
        answer = "no answer" if found.answer is None else found.answer.text
        given = " | ".join(dict.fromkeys(question.answers)) or "no answer"
        others = " | ".join(other.text for other in found.next_best[:SHOWN])
        console.print()
        console.print(
            Text(question.text.strip(), style="bold")
            .append(f"  {answer}  ", _MARK)
            .append(f"(gold: {given}; next best: {others})")
        )
        console.print(passage_text(found, layers))


def passage_text(found: ReadPassage, layers: int) -> Text:
    """The passage as it is written, words coloured."""
    text = Text(found.question.passage)
    for start, end, depth in found.words:
        text.stylize(f"{'bold ' if depth == layers else ''}{show.colour(depth, layers)}", start, end)
    if found.answer is not None:
        text.stylize(_MARK, found.answer.start, found.answer.end)
    return text


def of_different_passages(questions: Sequence[Question]) -> Iterator[Question]:
    """The first question about each passage: neighbours in the files share theirs."""
    seen: set[str] = set()
    for question in questions:
        if question.passage not in seen:
            seen.add(question.passage)
            yield question
