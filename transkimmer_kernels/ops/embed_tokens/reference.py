from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...library import implement


@implement("embed_tokens", "reference")
def embed_tokens(
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor,
    type_weight: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    total = F.embedding(input_ids, word_weight)
    if type_weight is not None:
        total += type_weight[0] if token_type_ids is None else F.embedding(token_type_ids, type_weight)
    if position_ids is None:
        total += position_weight[: input_ids.size(1)]
    else:
        total += F.embedding(position_ids, position_weight)
    return F.layer_norm(total, norm_weight.shape, norm_weight, norm_bias, eps)
