"""Transkimmer in wall-clock: Hugging Face encoders that skip, layer by layer, the tokens they need not read."""

from .config import SkimConfig
from .loading import from_pretrained
from .records import SkimRecord, record_skimming
from .skimming import add_skimming, remove_skimming

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
