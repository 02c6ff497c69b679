from __future__ import annotations

import torch
from torch import Tensor

from ...library import implement


@implement("choose_rows", "reference")
def choose_rows(keep: Tensor, hidden: Tensor, final: Tensor) -> Tensor:
    return torch.where((keep != 0).unsqueeze(-1), hidden, final).contiguous()


@implement("choose_rows_backward", "reference")
def choose_rows_backward(
    grad: Tensor, keep: Tensor, hidden: Tensor, final: Tensor, of_keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    grad_hidden = grad * keep.to(grad.dtype).unsqueeze(-1)
    grad_keep, wide = keep.new_empty(0), keep.dtype
    if of_keep:
        grad_keep = torch.linalg.vecdot(hidden.to(wide) - final.to(wide), grad.to(wide))
    return grad_keep, grad_hidden, grad - grad_hidden
