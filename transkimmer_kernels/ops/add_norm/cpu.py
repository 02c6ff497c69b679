"""On a CPU PyTorch's own operators: they are threaded, and a training step there is products for the most part."""

from ...library import implement
from .reference import add_norm, add_norm_backward

implement("add_norm", "cpu")(add_norm)
implement("add_norm_backward", "cpu")(add_norm_backward)
