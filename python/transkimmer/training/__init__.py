"""Training a skimming model: a Hugging Face `Trainer` with the few things skimming needs."""

from .calibration import calibrate
from .evaluation import SkimEvaluation, evaluate_classifier
from .trainer import SkimTrainer, SkimTrainingArguments

__all__ = ["SkimEvaluation", "SkimTrainer", "SkimTrainingArguments", "calibrate", "evaluate_classifier"]
