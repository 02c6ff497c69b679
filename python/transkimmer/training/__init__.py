"""Training a skimming model: a Hugging Face `Trainer` with the few things skimming needs."""

from .calibration import calibrate
from .evaluation import ForwardDifference, SkimEvaluation, evaluate_classifier, training_forward_difference
from .trainer import SkimTrainer, SkimTrainingArguments, SteadyTrainer, TrainingDiverged

__all__ = [
    "ForwardDifference",
    "SkimEvaluation",
    "SkimTrainer",
    "SkimTrainingArguments",
    "SteadyTrainer",
    "TrainingDiverged",
    "calibrate",
    "evaluate_classifier",
    "training_forward_difference",
]
