"""The ragged encoder loop."""

from .encoder import LayerWeights, PredictorWeights, Trace, run_encoder

__all__ = ["LayerWeights", "PredictorWeights", "Trace", "run_encoder"]
