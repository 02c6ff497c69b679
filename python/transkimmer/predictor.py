"""The skim predictor: a small network before every layer that decides, token by token, keep or skim."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SKIM, KEEP = 0, 1


class SkimPredictor(nn.Module):
    """LayerNorm -> Linear -> LayerNorm -> GELU -> Linear to (skim, keep) logits (Transkimmer, Eq. 2 and section 4.2).

    The first LayerNorm is the published code's; the paper's equation starts at the Linear. With the inner width equal
    to the hidden size d it has d^2 + 7d + 2 parameters.
    """

    def __init__(self, hidden_size: int, width: int | None = None, bias_init: float = 5.0) -> None:
        super().__init__()
        width = width or hidden_size
        self.norm1 = nn.LayerNorm(hidden_size)
        self.fc = nn.Linear(hidden_size, width)
        self.norm2 = nn.LayerNorm(width)
        self.out = nn.Linear(width, 2)
        self.reset_parameters(bias_init)

    @torch.no_grad()
    def reset_parameters(self, bias_init: float) -> None:
        """Starts out keeping everything: the biases are unbalanced by `bias_init` either way."""
        self.norm1.reset_parameters()
        self.norm2.reset_parameters()
        for linear in (self.fc, self.out):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)
        nn.init.normal_(self.out.bias, std=0.02)
        self.shift(2 * bias_init)

    @torch.no_grad()
    def shift(self, by: float | Tensor) -> None:
        """Adds `by` to every logit."""
        self.out.bias[KEEP] += by / 2
        self.out.bias[SKIM] -= by / 2

    def forward(self, hidden: Tensor, norm: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__) -> Tensor:
        """hidden [..., d] -> keep-minus-skim logit fp32 [...]: all that a decision depends on.

        norm: applies a LayerNorm.
        """
        x = norm(self.norm2, self.fc(norm(self.norm1, hidden)))
        weight, bias = self.difference()
        return F.linear(F.gelu(x), weight.unsqueeze(0), bias).squeeze(-1).float()

    def difference(self) -> tuple[Tensor, Tensor]:
        """(weight [width], bias [1]) of the keep-minus-skim logit."""
        weight, bias = self.out.weight, self.out.bias
        return weight[KEEP] - weight[SKIM], (bias[KEEP] - bias[SKIM]).unsqueeze(0)
