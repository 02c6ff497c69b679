"""The floor under a time: bytes that must move over the rate of a copy, operations over the rate of a large product.

Both rates are measured in the same process, not taken from a data sheet.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .sizes import ON_GPU

_COPY_BYTES = 2**30
_MATMUL = 8192
_REPEATS = 10


@dataclass(frozen=True)
class Ceilings:
    """None where there is no device to measure."""

    bytes_per_s: float | None = None
    flops_per_s: float | None = None

    def bound_us(self, moved: int, flops: int) -> float | None:
        if self.bytes_per_s is None or self.flops_per_s is None:
            return None
        return 1e6 * max(moved / self.bytes_per_s, flops / self.flops_per_s)


@functools.cache
def ceilings() -> Ceilings:
    if not ON_GPU:
        return Ceilings()
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(_MATMUL, _MATMUL, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return Ceilings(
        bytes_per_s=2 * _COPY_BYTES / _seconds(lambda: target.copy_(source)),
        flops_per_s=2 * _MATMUL**3 / _seconds(lambda: torch.mm(a, b)),
    )


def _seconds(run: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(_REPEATS + 3):  # three to warm up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


def size(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the tensors' elements."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
