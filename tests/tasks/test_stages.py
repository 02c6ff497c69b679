"""A stage of training whose disk is full: what is said of it, what is not taken for it, and what stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from transkimmer.data import Example, TokenizedExamples
from transkimmer.tasks import TASKS
from transkimmer.training import SteadyTrainer
from transkimmer.training.recipe import recipe_of
from transkimmer.training.stages import save_whole, train_stage

from ..models.tiny import tiny
from ..models.words import word_tokenizer

FULL = OSError(errno.ENOSPC, "No space left on device")
OF_THE_DISK = [
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError(
        "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0: file write failed"
    ),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 498240 vs 498128"),
]
OF_THE_DISK[-1].__context__ = RuntimeError("basic_ios::clear: iostream error")
OF_SOMETHING_ELSE = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    SafetensorError("Error while deserializing header: header too large"),
]


def train_until(error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SteadyTrainer, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(SteadyTrainer, "train", fail)
    tokenizer = word_tokenizer()
    examples = TokenizedExamples([Example("dog runs", 0)], tokenizer)
    recipe = recipe_of("corrected", TASKS["sst2"])
    train_stage(tiny("bert", "sequence"), tokenizer, examples, recipe, folder, skimming=False)


@pytest.mark.parametrize("error", OF_THE_DISK, ids=lambda error: type(error).__name__)
def test_a_disk_that_is_full_is_told(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=r"a checkpoint could not be written \(.*; go on with --resume") as caught:
        train_until(error, tmp_path, monkeypatch)
    assert str(error) in str(caught.value) and caught.value.__cause__ is error


@pytest.mark.parametrize("error", [*OF_SOMETHING_ELSE, FULL], ids=lambda error: type(error).__name__)
def test_what_is_clear_or_not_of_the_disk_stays_what_it_is(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(type(error)) as caught:
        train_until(error, tmp_path, monkeypatch)
    assert caught.value is error


@pytest.mark.parametrize("error", [*OF_THE_DISK, FULL], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_a_model_that_cannot_be_written_leaves_the_old_one(
    error: Exception, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, folder = tiny("bert", "sequence"), word_tokenizer(), tmp_path / "model"
    save_whole(model, tokenizer, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(self: object, partial: Path) -> None:
        partial.mkdir(exist_ok=True)
        (partial / "half").write_text("of it", encoding="utf-8")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(type(model) if kind == "model" else PreTrainedTokenizerFast, "save_pretrained", fail)
        torch.nn.init.zeros_(model.classifier.weight)
        with pytest.raises(OSError, match=r"model: the model could not be written \(.*; go on with --resume"):
            save_whole(model, tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    save_whole(model, tokenizer, folder)
    assert not load_file(folder / "model.safetensors")["classifier.weight"].any()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_cannot_be_put_in_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, folder = tiny("bert", "sequence"), word_tokenizer(), tmp_path / "model"
    save_whole(model, tokenizer, folder)
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if source.name == "model.partial":
            raise FULL
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="could not be written"):
        save_whole(model, tokenizer, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (folder / "model.safetensors").is_file()


def test_an_error_of_a_device_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OF_SOMETHING_ELSE[0]
    model = tiny("bert", "sequence")

    def fail(self: object, partial: Path) -> None:
        raise error

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(RuntimeError) as caught:
        save_whole(model, word_tokenizer(), tmp_path / "model")
    assert caught.value is error
