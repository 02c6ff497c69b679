"""Examples of text tasks, and batches made from them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .architectures import ARCHITECTURES


@dataclass(frozen=True)
class Example:
    """A text, or a pair of them, and its class number, or the number to predict."""

    text: str
    label: int | float
    pair: str | None = None


class Features(Dataset[dict[str, object]]):
    """Tokenized inputs and what is wanted of a model on each, for a `Trainer` and for `padded_batches`.

    Attributes:
        columns: a model's inputs by name, per row; not padded.
        labels: per row.
        teacher_logits: per row, [classes] or, of the start and the end of an answer, [2, seq]; None: no teacher.
        teacher_states: per row, [d], the teacher's final state of the first token; None: no teacher.
    """

    def __init__(
        self,
        columns: Mapping[str, list[list[int]]],
        labels: Sequence[int | float],
        teacher_logits: Sequence[Tensor] | Tensor | None = None,
    ) -> None:
        self.columns = dict(columns)
        self.labels = list(labels)
        self.teacher_logits = teacher_logits
        self.teacher_states: Sequence[Tensor] | None = None

    @property
    def input_ids(self) -> list[list[int]]:
        return self.columns["input_ids"]

    def targets(self, index: int) -> dict[str, object]:
        """The arguments from which a model's head computes its loss."""
        return {"labels": self.labels[index]}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, object]:
        example: dict[str, object] = {name: column[index] for name, column in self.columns.items()}
        example |= self.targets(index)
        if self.teacher_logits is not None:
            example["teacher_logits"] = self.teacher_logits[index].tolist()
        if self.teacher_states is not None:
            example["teacher_states"] = self.teacher_states[index].tolist()
        return example


class TokenizedExamples(Features):
    """Examples with `input_ids` and `labels`, and `teacher_logits` where they are given, for a `Trainer`.

    Texts longer than `max_length` tokens are cut (of a pair, the longer one), and a warning says how many.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 512,
        teacher_logits: Tensor | None = None,
    ) -> None:
        columns = _tokenize(examples, tokenizer, max_length)
        super().__init__(columns, [example.label for example in examples], teacher_logits)


def _tokenize(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[list[int]]]:
    texts = [example.text for example in examples]
    pairs = [example.pair for example in examples if example.pair is not None]
    if pairs and len(pairs) != len(texts):
        raise ValueError(f"examples: {len(pairs)} of {len(texts)} have a second text; all must, or none")
    encoding = tokenizer(texts, pairs or None, verbose=False, return_attention_mask=False)
    too_long = sum(len(ids) > max_length for ids in encoding["input_ids"])
    if too_long:
        encoding = tokenizer(texts, pairs or None, truncation=True, max_length=max_length, return_attention_mask=False)
        warnings.warn(f"{too_long} of {len(texts)} texts are cut to {max_length} tokens", stacklevel=3)
    return encoding


def padded_batches(
    examples: Features, tokenizer: PreTrainedTokenizerBase, batch_size: int, *, sort: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Batches padded to their longest example, in the order of the file or (`sort`) by length."""
    order = list(range(len(examples)))
    if sort:
        order.sort(key=lambda i: len(examples.input_ids[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        columns = {name: [column[i] for i in chosen] for name, column in examples.columns.items()}
        batch = tokenizer.pad(columns, return_tensors="pt")
        batch["labels"] = torch.tensor([examples.labels[i] for i in chosen])
        yield dict(batch)


def positions_of(config: PreTrainedConfig) -> int:
    """Tokens that fit a model's position embeddings."""
    architecture = ARCHITECTURES.get(config.model_type)
    taken = config.pad_token_id + 1 if architecture is not None and architecture.counts_from_padding else 0
    return int(config.max_position_embeddings) - taken
