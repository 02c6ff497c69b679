"""The points of an accuracy-speed curve that calibration leads to."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel
from transkimmer.training.calibration import calibrate


def calibrated(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], speedups: Sequence[float], name: str
) -> Iterator[tuple[float, float]]:
    """Calibrates `model` to one FLOPs speedup after the other; says on stderr which ones no shift leads to.

    Args:
        batches: of held-out rows. speedups: in ascending order. name: of the training, for messages.

    Yields:
        (speedup, what was added to the logits since the model was trained), where the model is that fast.
    """
    shift = 0.0
    for wanted in speedups:
        try:
            shift += calibrate(model, batches, wanted)
        except ValueError as error:
            # `calibrate` has one class for all that it refuses; what tells these cases apart is the message.
            too_slow, too_fast = (f"at {limit}; train with" in str(error) for limit in ("most", "least"))
            if not (too_slow or too_fast):
                raise
            print(f"{name}: {error}", file=sys.stderr)
            if too_slow:  # and so for every larger one
                return
            continue
        yield wanted, shift
