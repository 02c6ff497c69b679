"""The demo: MiniLM trained to skim on SST-2, small enough to come with the package."""

from .model import CLASS_NAMES, load_demo, sentences, stored_figures

__all__ = ["CLASS_NAMES", "load_demo", "sentences", "stored_figures"]
