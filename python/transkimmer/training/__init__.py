"""Training a skimming model: a Hugging Face `Trainer` with the few things skimming needs."""

from .calibration import calibrate
from .evaluation import (
    ForwardDifference,
    SkimEvaluation,
    evaluate,
    evaluate_classifier,
    training_forward_difference,
)
from .judges import ClassJudge, SpanJudge
from .trainer import SkimTrainer, SkimTrainingArguments, SteadyTrainer, TrainingDiverged

__all__ = [
    "ClassJudge",
    "ForwardDifference",
    "SkimEvaluation",
    "SkimTrainer",
    "SkimTrainingArguments",
    "SpanJudge",
    "SteadyTrainer",
    "TrainingDiverged",
    "calibrate",
    "evaluate",
    "evaluate_classifier",
    "training_forward_difference",
]
