"""Transkimmer in wall-clock: Hugging Face encoders that skip, layer by layer, the tokens they need not read."""

import importlib
from typing import TYPE_CHECKING, Any

from .config import SkimConfig
from .loading import from_pretrained
from .records import SkimRecord, record_skimming
from .skimming import add_skimming, remove_skimming

if TYPE_CHECKING:
    from . import flops as flops
    from . import training as training

__version__ = "0.1.0"

__all__ = [
    "SkimConfig",
    "SkimRecord",
    "__version__",
    "add_skimming",
    "from_pretrained",
    "record_skimming",
    "remove_skimming",
]

# Imported when they are asked for: training brings along what inference does without.
_SUBMODULES = ("flops", "training")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
