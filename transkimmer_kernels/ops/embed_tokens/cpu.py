"""On a CPU PyTorch's own operators: embeddings are a thousandth of a forward there."""

from ...library import implement
from .reference import embed_tokens

implement("embed_tokens", "cpu")(embed_tokens)
