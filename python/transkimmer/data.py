"""Sentence files of the GLUE kind, and batches made from them."""

from __future__ import annotations

import csv
import lzma
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sentence:
    text: str
    label: int


def read_sst2(path: str | os.PathLike[str]) -> list[Sentence]:
    """Reads an SST-2 file: UTF-8, tab-separated, unquoted, header `sentence label`, labels 0 and 1; `.xz` is unpacked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a missing column, a label that is not 0 or 1, or no rows; names file and line.
    """
    path = Path(path)
    unpack = lzma.open if path.suffix == ".xz" else open
    with unpack(path, "rt", encoding="utf-8") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(rows, [])
        if header[:2] != ["sentence", "label"]:
            raise ValueError(f"{path}: expected the header 'sentence<tab>label', got {header}")
        sentences = []
        for number, row in enumerate(rows, start=2):
            if len(row) != 2 or row[1] not in ("0", "1"):
                raise ValueError(f"{path}, line {number}: expected a sentence and a label 0 or 1, got {row}")
            sentences.append(Sentence(row[0], int(row[1])))
    if not sentences:
        raise ValueError(f"{path}: has a header but no sentences")
    return sentences


def sample_path() -> Path:
    """The SST-2 development sentences that come with the package."""
    return Path(str(resources.files("transkimmer"))) / "demo" / "sst2-dev.tsv"


class TokenizedSentences(Dataset[dict[str, object]]):
    """Examples with `input_ids` and `labels`, and `teacher_logits` where they are given, for a `Trainer`."""

    def __init__(
        self,
        sentences: Sequence[Sentence],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 512,
        teacher_logits: Tensor | None = None,
    ) -> None:
        texts = [sentence.text for sentence in sentences]
        self.input_ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        self.labels = [sentence.label for sentence in sentences]
        self.teacher_logits = teacher_logits

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, object]:
        example: dict[str, object] = {"input_ids": self.input_ids[index], "labels": self.labels[index]}
        if self.teacher_logits is not None:
            example["teacher_logits"] = self.teacher_logits[index].tolist()
        return example


def padded_batches(
    examples: TokenizedSentences, tokenizer: PreTrainedTokenizerBase, batch_size: int, *, sort: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Batches padded to their longest example, in the order of the file or (`sort`) by length."""
    order = list(range(len(examples)))
    if sort:
        order.sort(key=lambda i: len(examples.input_ids[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [examples.input_ids[i] for i in chosen]}, return_tensors="pt")
        batch["labels"] = torch.tensor([examples.labels[i] for i in chosen])
        yield dict(batch)
