"""Saving, loading, copying and pickling a skimming model."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transkimmer import SkimConfig, add_skimming, from_pretrained, loading, remove_skimming

from .tiny import ARCHITECTURES, HEADS, padded_inputs, tiny, undecided_predictors

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@every_architecture
@torch.no_grad()
def test_save_and_load(architecture: str, tmp_path: Path) -> None:
    model = add_skimming(tiny(architecture, "sequence"), SkimConfig(threshold=0.4, skim_weight=0.7))
    undecided_predictors(model)
    inputs = padded_inputs()
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, HEADS["sequence"])
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.skimming.config == SkimConfig(threshold=0.4, skim_weight=0.7)
    assert not loaded.training
    architectures = json.loads((tmp_path / "config.json").read_text())["architectures"]
    assert architectures == [type(tiny(architecture, "sequence")).__name__]
    # Plain Hugging Face still loads it, as the dense model.
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.allclose(dense(**inputs).logits, remove_skimming(model)(**inputs).logits, atol=1e-6)


@torch.no_grad()
def test_save_and_load_in_several_files(tmp_path: Path) -> None:
    model = add_skimming(tiny("bert", "sequence"))
    undecided_predictors(model)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    inputs = padded_inputs()
    assert torch.equal(from_pretrained(tmp_path, HEADS["sequence"])(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_predictors_come_from_the_files_that_the_backbone_comes_from(tmp_path: Path) -> None:
    """An index that an earlier save has left behind is not looked at where there is one file, nor another variant."""
    inputs = padded_inputs()
    expected = {}
    for variant, seed in (("old", 3), ("new", 4)):
        torch.manual_seed(seed)
        model = add_skimming(tiny("bert", "sequence", initializer_range=0.1 + seed / 100))
        undecided_predictors(model)
        for predictor in model.skimming.predictors:
            predictor.out.bias.copy_(torch.tensor([seed - 4.0, 0.0]))
        expected[variant] = model.eval()(**inputs).logits
        for max_shard_size in ("60KB", "1GB"):
            model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
            model.save_pretrained(tmp_path / "variants", variant=variant, max_shard_size=max_shard_size)
    assert torch.equal(from_pretrained(tmp_path, HEADS["sequence"])(**inputs).logits, expected["new"])
    for variant, logits in expected.items():
        loaded = from_pretrained(tmp_path / "variants", HEADS["sequence"], variant=variant)
        assert torch.equal(loaded(**inputs).logits, logits)


def test_hugging_faces_report_is_returned_where_it_is_asked_for(tmp_path: Path) -> None:
    add_skimming(tiny("bert")).save_pretrained(tmp_path)
    model, report = from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"] and len(model.skimming.predictors) == 3


@torch.no_grad()
def test_a_folder_below_the_one_named(tmp_path: Path) -> None:
    model = add_skimming(tiny("bert", "sequence"), SkimConfig(threshold=0.4))
    undecided_predictors(model)
    model.save_pretrained(tmp_path / "last", max_shard_size="60KB")
    loaded = from_pretrained(tmp_path, HEADS["sequence"], subfolder="last")
    inputs = padded_inputs()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("max_shard_size", ["60KB", "1GB"])
def test_where_a_model_is_looked_for_holds_for_all_its_files(
    max_shard_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in a hub's place, to which a revision and the like mean nothing, notes what it is asked for with."""
    add_skimming(tiny("bert")).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    asked: dict[str, list[dict[str, Any]]] = {"config": [], "file": [], "class": []}
    where = {"revision": "v2", "token": "secret", "cache_dir": str(tmp_path / "cache"), "subfolder": "last"}
    where |= {"force_download": True, "local_files_only": True}

    def noting(kind: str, function: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            asked[kind].append({name: value for name, value in options.items() if name in where})
            return function(*arguments, **{name: value for name, value in options.items() if name not in where})

        return run

    class Config:
        from_pretrained = staticmethod(noting("config", AutoConfig.from_pretrained))

    class Model:
        from_pretrained = staticmethod(noting("class", AutoModel.from_pretrained))

    monkeypatch.setattr(loading, "AutoConfig", Config)
    monkeypatch.setattr(loading, "cached_file", noting("file", loading.cached_file))
    from_pretrained(tmp_path, Model, **where)
    assert all(options == where for calls in asked.values() for options in calls)
    files = len(list(tmp_path.glob("*.safetensors"))) if max_shard_size == "60KB" else 1
    assert len(asked["config"]) == len(asked["class"]) == 1 and 1 <= len(asked["file"]) <= 2 + files


@every_architecture
def test_unbalanced_initialisation_survives_loading(architecture: str, tmp_path: Path) -> None:
    add_skimming(tiny(architecture)).save_pretrained(tmp_path)
    for predictor in from_pretrained(tmp_path).skimming.predictors:
        assert torch.allclose(predictor.out.bias, torch.tensor([-5.0, 5.0]), atol=0.1)
        assert 0.01 < predictor.out.weight.std() < 0.03 and 0.01 < predictor.fc.weight.std() < 0.03


def test_loading_what_has_no_skimming(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no 'skimming'.*add_skimming"):
        from_pretrained(tmp_path)


def test_loading_with_predictors_missing(tmp_path: Path) -> None:
    model = tiny("bert")
    model.config.skimming = SkimConfig().to_dict()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="skim predictors do not fit"):
        from_pretrained(tmp_path)


@torch.no_grad()
def test_copies_and_pickles_are_independent() -> None:
    model = add_skimming(tiny("bert", "sequence"))
    undecided_predictors(model)
    inputs = padded_inputs()
    before = model(**inputs).logits  # fills the weight cache, whose packed weights cannot be copied
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).logits, before)
        other.skimming.config.threshold = 0.999
        assert not torch.equal(other(**inputs).logits, before)
        assert torch.equal(model(**inputs).logits, before)


def test_what_is_changed_on_a_live_model_is_saved(tmp_path: Path) -> None:
    config = SkimConfig(threshold=0.4)
    model, other = (add_skimming(tiny("bert"), config) for _ in range(2))
    model.skimming.config.threshold = 0.7
    model.skimming.config.schedule = (1.0, 0.5, 0.5)
    copied = copy.deepcopy(model)
    copied.skimming.config.threshold = 0.2
    model.skimming.config.set_for_now("noise", 0.0)
    with pytest.raises(ValueError, match="threshold=1: must be"):
        model.skimming.config.threshold = 1
    for number, (changed, threshold) in enumerate(((model, 0.7), (other, 0.7), (copied, 0.2))):
        changed.save_pretrained(tmp_path / str(number))
        loaded = from_pretrained(tmp_path / str(number)).skimming.config
        assert (loaded.threshold, loaded.schedule, loaded.noise) == (threshold, [1.0, 0.5, 0.5], 1.0)
    assert model.skimming.config.noise == 0
    copy.copy(config).threshold = 0.9
    with pytest.raises(ValueError, match="predictor_width=16: the model has its predictors; must stay None"):
        config.predictor_width = 16
    remove_skimming(model)
    assert other.config.skimming["threshold"] == 0.7
    config.threshold = 0.3
    assert not hasattr(model.config, "skimming") and other.config.skimming["threshold"] == 0.3


def test_a_pickle_is_read_in_a_process_that_has_made_no_model(tmp_path: Path) -> None:
    model = add_skimming(tiny("roberta", "sequence")).eval()
    undecided_predictors(model)
    inputs = padded_inputs()
    with torch.no_grad():
        torch.save((model, inputs, model(**inputs).logits), tmp_path / "model.pt")
    script = f"""
import torch
model, inputs, logits = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, logits)
print(type(model.roberta.encoder).__name__, type(model.roberta.embeddings).__name__)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.split() == ["SkimmingRobertaEncoder", "SkimmingRobertaEmbeddings"], run.stderr
    encoder = type(model.roberta.encoder)
    assert pickle.loads(pickle.dumps(encoder)) is encoder
