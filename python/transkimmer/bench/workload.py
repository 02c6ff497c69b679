"""What is timed: a model, batches of real text or of real lengths, and the keep ratios of a schedule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..arguments import check_pretrained
from ..data import TokenizedExamples, padded_batches
from ..skimming import CONFIG_KEY

_SEQUENCES = 1024  # where all have one length
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Model shapes that need no weights: what a matrix product costs does not depend on the numbers in it.
RANDOM_SHAPES = {
    "bert-base-shape": BertConfig(),
    "bert-large-shape": BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "e5-small-shape": BertConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536),
}

# Keep ratio per layer, rho ** (l + 1), fitted to the padding-free speedups that the paper reports on its tasks
# (Transkimmer, Table 3, BERT-base; at most the mean length given there). Synthetic: no predictor decided them.
SCHEDULES = {
    "cola": 0.895,
    "rte": 0.806,
    "qqp": 0.810,
    "mrpc": 0.787,
    "sst2": 0.913,
    "mnli": 0.870,
    "wnli": 0.653,
    "qnli": 0.844,
    "stsb": 0.767,
    "squad2": 0.865,
    "20news": 0.687,
    "yelp": 0.833,
    "imdb": 0.821,
}


@dataclass
class Batch:
    """inputs: padded `input_ids` and `attention_mask` [batch, seq]; lengths: int64 [batch]; labels: [batch] or None."""

    inputs: dict[str, Tensor]
    lengths: Tensor
    labels: Tensor | None = None

    def to(self, device: str) -> Batch:
        """With the inputs on `device`; lengths and labels stay on the host."""
        return Batch({name: tensor.to(device) for name, tensor in self.inputs.items()}, self.lengths, self.labels)


def parse_schedule(text: str, layers: int) -> list[float]:
    """A name of `SCHEDULES`, or comma-separated keep ratios, one per layer."""
    if text in SCHEDULES:
        return [SCHEDULES[text] ** (layer + 1) for layer in range(layers)]
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--schedule {text}: must be one of {', '.join(SCHEDULES)}, or ratios like 1,0.8,0.5"
        ) from None
    if len(ratios) != layers:
        raise ValueError(f"--schedule {text}: has {len(ratios)} ratios, but the model has {layers} layers")
    return ratios


def check_model(name: str) -> None:
    """Raises ValueError where `load_model` would find nothing."""
    if name not in RANDOM_SHAPES:
        check_pretrained("--model", name)


def load_model(name: str) -> PreTrainedModel:
    """A Hugging Face classifier by hub name or folder, or one of `RANDOM_SHAPES` with random weights."""
    if name in RANDOM_SHAPES:
        torch.manual_seed(0)
        return BertForSequenceClassification(RANDOM_SHAPES[name]).eval()
    check_model(name)
    model = AutoModelForSequenceClassification.from_pretrained(name)
    if hasattr(model.config, CONFIG_KEY):
        delattr(model.config, CONFIG_KEY)  # its predictors are not what a schedule times
    return model.eval()


def known_lengths() -> dict[str, list[int]]:
    """Token counts of real texts by data set: mrpc, sst2, rte, imdb, squad2."""
    text = (resources.files("transkimmer") / "bench" / "lengths.json").read_text(encoding="utf-8")
    return json.loads(text)


def lengths_of(source: str, tokenizer_name: str | None, max_length: int) -> list[int]:
    """Lengths of a known data set, one length for many sequences, or those of a text file's lines, tokenised."""
    known = known_lengths()
    if source in known:
        return [min(length, max_length) for length in known[source]]
    if source.isdigit() and 1 <= int(source) <= max_length:
        return [int(source)] * _SEQUENCES
    path = Path(source)
    if source.isdigit() and not path.is_file():
        raise ValueError(f"--lengths {source}: a number must be from 1 to {max_length} here")
    if not path.is_file():
        allowed = f"one of {', '.join(known)}, a number up to {max_length}, or a text file with a text per line"
        raise ValueError(f"--lengths {source}: must be {allowed}")
    if tokenizer_name is None:
        raise ValueError(f"--lengths {source}: a text file needs --tokenizer NAME")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--lengths {source}: the file has no text")
    check_pretrained("--tokenizer", tokenizer_name, ("tokenizer",))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    return [len(ids) for ids in tokenizer(lines, truncation=True, max_length=max_length)["input_ids"]]


def random_batches(lengths: Sequence[int], batch_size: int, count: int, vocabulary: int) -> list[Batch]:
    """`count` batches of random tokens with the given lengths, taken in order."""
    if len(lengths) < batch_size:
        raise ValueError(f"--batch-size {batch_size}: there are only {len(lengths)} lengths")
    generator = torch.Generator().manual_seed(0)
    batches = []
    for start in range(0, len(lengths) - batch_size + 1, batch_size)[:count]:
        chosen = torch.tensor(lengths[start : start + batch_size])
        mask = (torch.arange(int(chosen.max())) < chosen[:, None]).long()
        ids = torch.randint(min(1000, vocabulary // 2), vocabulary, mask.shape, generator=generator) * mask
        batches.append(Batch({"input_ids": ids, "attention_mask": mask}, chosen))
    return batches


def demo_batches(tokenizer: PreTrainedTokenizerBase, batch_size: int, count: int | None = None) -> list[Batch]:
    """The SST-2 development sentences in the order of their file, `count` batches of them, with labels."""
    from ..demo import sentences

    examples = TokenizedExamples(sentences(), tokenizer)
    batches = []
    for inputs in padded_batches(examples, tokenizer, batch_size):
        labels = inputs.pop("labels")
        batches.append(Batch(inputs, inputs["attention_mask"].sum(1), labels))
        if len(batches) == count:
            break
    return batches
