"""The ragged encoder loop, and captured forwards."""

from .encoder import LayerWeights, Policy, PredictorWeights, Trace, run_encoder
from .graphs import GraphCache, GraphTooLarge

__all__ = ["GraphCache", "GraphTooLarge", "LayerWeights", "Policy", "PredictorWeights", "Trace", "run_encoder"]
