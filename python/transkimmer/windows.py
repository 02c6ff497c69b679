"""Questions about passages, and the windows of tokens that a model reads them in."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data import Features

# Questions that are tokenized at a time: encodings of a whole training set would not fit into every memory.
_CHUNK = 1000


@dataclass(frozen=True)
class Question:
    """A question about a passage, the answers given to it, and the character of the passage at which each starts.

    Without answers it is a question that the passage does not answer.
    """

    id: str
    text: str
    passage: str
    answers: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()


class QuestionWindows(Features):
    """Questions as inputs `[CLS] question [SEP] window of the passage [SEP]`, for a `Trainer` and for evaluation.

    A passage that is too long is read in several windows. In training, a window that does not hold the whole (first)
    answer is one without answer: both positions are the first token's. `labels` are the windows' own numbers, by
    which a judge of the output finds the questions again.

    Args:
        tokenizer: a fast one, that pads on the right.
        max_length: most tokens of a window, question and special tokens included.
        doc_stride: tokens of the passage that neighbouring windows share.

    Attributes:
        questions: as given; question_of: per window, the number of its question.
        passages: int64 [windows, 2], first token of the passage and the one behind its last.
        offsets: per window, int32 [tokens of the passage, 2], first character of a token and the one behind its last.
        positions: per window, first and last token of the answer.

    Raises:
        ValueError: a question leaves no room for its passage, or no more than `doc_stride`, or the tokenizer does not
            fit.
    """

    def __init__(
        self, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
    ) -> None:
        super().__init__({}, [])
        if not tokenizer.is_fast or tokenizer.padding_side != "right":
            raise ValueError(
                f"tokenizer: questions need a fast one that pads on the right, not this {type(tokenizer).__name__}"
            )
        self.questions = list(questions)
        self.question_of: list[int] = []
        self.offsets: list[Tensor] = []
        self.positions: list[tuple[int, int]] = []
        passages: list[tuple[int, int]] = []
        for start in range(0, len(self.questions), _CHUNK):
            chunk = self.questions[start : start + _CHUNK]
            _check_room(chunk, tokenizer, max_length, doc_stride)
            encoding = tokenizer(
                [question.text.strip() for question in chunk],
                [question.passage for question in chunk],
                truncation="only_second",
                max_length=max_length,
                stride=doc_stride,
                return_overflowing_tokens=True,
                return_attention_mask=False,
            )
            for window, number in enumerate(encoding.pop("overflow_to_sample_mapping")):
                passages.append(self._add(start + number, encoding.encodings[window]))
            for name, column in encoding.items():
                self.columns.setdefault(name, []).extend(column)
        self.passages = torch.tensor(passages).view(-1, 2)
        self.labels = list(range(len(passages)))

    def _add(self, number: int, encoding: Any) -> tuple[int, int]:
        """Notes one window of question `number`; returns where its passage lies."""
        which = encoding.sequence_ids
        tokens = which.count(1)
        first = which.index(1) if tokens else len(which)
        offsets = encoding.offsets[first : first + tokens]
        self.question_of.append(number)
        self.offsets.append(torch.tensor(offsets, dtype=torch.int32).view(-1, 2))
        self.positions.append(_answer_tokens(self.questions[number], offsets, first))
        return first, first + tokens

    def targets(self, index: int) -> dict[str, object]:
        start, end = self.positions[index]
        return {"start_positions": start, "end_positions": end}


def _answer_tokens(question: Question, offsets: Sequence[tuple[int, int]], first: int) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) where the passage's tokens, from `first` on, lack part of it."""
    if not question.answers or not offsets:
        return 0, 0
    start = question.starts[0]
    end = start + len(question.answers[0])
    if start < offsets[0][0] or end > offsets[-1][1]:
        return 0, 0
    # The last token that starts at or before the answer, the first that ends at or behind its end.
    low = bisect.bisect_right([token[0] for token in offsets], start) - 1
    high = bisect.bisect_left([token[1] for token in offsets], end)
    return first + low, first + max(low, high)


def _check_room(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
) -> None:
    texts = [question.text.strip() for question in questions]
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    special = tokenizer.num_special_tokens_to_add(pair=True)
    length, question = max(((len(found), q) for found, q in zip(ids, questions, strict=True)), key=lambda pair: pair[0])
    room = max_length - special - length
    if room < 1:
        raise ValueError(
            f"max_length {max_length}: question {question.id!r} has {length} tokens, which with {special} special ones "
            "leave no room for its passage"
        )
    if not 0 <= doc_stride < room:
        raise ValueError(
            f"doc_stride {doc_stride}: must be at least 0 and less than {room}, what question {question.id!r} of "
            f"{length} tokens leaves of max_length {max_length} for its passage"
        )
