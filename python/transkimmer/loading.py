"""Loading a skimming model back: `save_pretrained` is Hugging Face's, `from_pretrained` restores the predictors."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as hf_logging

from .architectures import encoder_of
from .config import SkimConfig
from .skimming import CONFIG_KEY, add_skimming

_PREDICTORS = "skim_predictors."
_HUB_ARGUMENTS = ("revision", "cache_dir", "force_download", "local_files_only", "token", "subfolder")


def from_pretrained(
    name_or_path: str | os.PathLike[str], auto_class: Any = AutoModel, *, kernels: str = "auto", **kwargs: Any
) -> Any:
    """Loads a model that was saved with skimming, predictors and `SkimConfig` included, in eval mode.

    Args:
        name_or_path: folder or hub name with `config.json` and safetensors weights.
        auto_class: `AutoModelForSequenceClassification` and the like, or a model class.
        kernels: as in `add_skimming`.
        **kwargs: go to the class's own `from_pretrained`.

    Returns:
        The model; (model, report) where `output_loading_info=True` asks for Hugging Face's report.

    Raises:
        ValueError: the checkpoint has no skimming (load it with Hugging Face and call `add_skimming`), or predictors
            are missing from it or of another shape.
    """
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    config = AutoConfig.from_pretrained(name_or_path, **hub)
    values = getattr(config, CONFIG_KEY, None)
    if values is None:
        raise ValueError(
            f"name_or_path={os.fspath(name_or_path)!r}: has no {CONFIG_KEY!r} in its config.json; load it with "
            f"{auto_class.__name__}.from_pretrained and call add_skimming"
        )
    skim_config = SkimConfig.from_dict(values)
    tensors = _predictor_tensors(os.fspath(name_or_path), kwargs.get("variant"), hub)
    model, report = _load_dense(name_or_path, auto_class, kwargs)
    add_skimming(model, skim_config, kernels=kernels)
    predictors = encoder_of(model).skim_predictors
    try:
        predictors.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"name_or_path={os.fspath(name_or_path)!r}: skim predictors do not fit: {error}") from error
    model.eval()
    return (model, report) if kwargs.get("output_loading_info") else model


def _load_dense(
    name_or_path: str | os.PathLike[str], auto_class: Any, options: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model without its predictors, which its class does not expect, and Hugging Face's report without them."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        model, report = auto_class.from_pretrained(name_or_path, **{**options, "output_loading_info": True})
    except RuntimeError:  # whose message points at a report
        hf_logging.set_verbosity(verbosity)
        auto_class.from_pretrained(name_or_path, **options)
        raise
    finally:
        hf_logging.set_verbosity(verbosity)
    if missing := sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}):
        warnings.warn(
            f"name_or_path={os.fspath(name_or_path)!r}: has no fitting {', '.join(missing)}, which are new: train them",
            stacklevel=3,
        )
    unexpected = report["unexpected_keys"]
    report["unexpected_keys"] = type(unexpected)(key for key in unexpected if _PREDICTORS not in key)
    return model, report


def _predictor_tensors(name_or_path: str, variant: str | None, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The predictors' state dict, from the safetensors files that Hugging Face reads the other weights from."""
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(name_or_path, variant, hub):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (no dict)
                if _PREDICTORS in key:
                    tensors[key.split(_PREDICTORS, 1)[1]] = file.get_tensor(key).to(torch.float32)
    return tensors


def _weight_files(name_or_path: str, variant: str | None, hub: dict[str, Any]) -> list[str]:
    """The one file with all weights; only where there is none, those of the index that have predictors in them."""
    whole, index = SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME
    if variant is not None:
        whole, index = whole.replace(".safe", f".{variant}.safe"), index.replace(".json", f".{variant}.json")

    def find(name: str, required: bool = True) -> Any:
        return cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=required, **hub)

    if (path := find(whole, required=False)) is not None:
        return [path]
    if (listed := find(index, required=False)) is None:
        return [find(whole)]  # raises
    with open(listed, encoding="utf-8") as file:
        weight_map = json.load(file)["weight_map"]
    names = {file for key, file in weight_map.items() if _PREDICTORS in key}
    return [find(name) for name in sorted(names)]
