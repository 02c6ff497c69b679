"""The logits in a head's output, whatever the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def logits_in(output: Any) -> Tensor:
    """[batch, classes], or of a question-answering head [batch, 2, seq]: where an answer starts and where it ends.

    The last dimension is what a softmax goes over.
    """
    if "logits" in output:
        return output.logits
    return torch.stack([output.start_logits, output.end_logits], 1)
