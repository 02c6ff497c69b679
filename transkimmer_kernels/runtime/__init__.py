"""The ragged encoder loop."""

from .encoder import LayerWeights, Policy, PredictorWeights, Trace, run_encoder

__all__ = ["LayerWeights", "Policy", "PredictorWeights", "Trace", "run_encoder"]
