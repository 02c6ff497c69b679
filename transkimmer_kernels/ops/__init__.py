"""The operators. A package per operator: schema, checks, fake and autograd in `__init__`, a file per backend."""

from ..library import load_operators

load_operators(
    __name__,
    (
        *("skim_logit", "compact", "rows", "ragged_attention", "ragged_linear", "skim_tokens", "encoder_layer"),
        *("embed_tokens", "add_norm", "choose_rows"),
    ),
)

from .add_norm import add_norm  # noqa: E402
from .choose_rows import choose_rows  # noqa: E402
from .compact import compact  # noqa: E402
from .embed_tokens import embed_tokens  # noqa: E402
from .encoder_layer import encoder_layer_  # noqa: E402
from .ragged_attention import ragged_attention  # noqa: E402
from .ragged_linear import ragged_linear, ragged_linear_norm, ragged_linear_norm_  # noqa: E402
from .rows import gather_rows, scatter_rows  # noqa: E402
from .skim_logit import skim_logit  # noqa: E402
from .skim_tokens import skim_tokens  # noqa: E402

__all__ = [
    "add_norm",
    "choose_rows",
    "compact",
    "embed_tokens",
    "encoder_layer_",
    "gather_rows",
    "ragged_attention",
    "ragged_linear",
    "ragged_linear_norm",
    "ragged_linear_norm_",
    "scatter_rows",
    "skim_logit",
    "skim_tokens",
]
