"""The floor under a time: FLOPs and bytes counted from the tokens worked on, over rates measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from transkimmer_kernels import kernel_set

from ..flops import EncoderShape
from .timing import synchronize

_PROBE_SECONDS = 0.3  # of each rate


@dataclass(frozen=True)
class Ceilings:
    """The best rates that a short probe reached: bytes/s of a large read or copy, FLOP/s of a large product."""

    bytes_per_s: float
    flops_per_s: float

    def highest(self, other: Ceilings) -> Ceilings:
        """Of two probes, since a busy spell of the machine only ever lowers a rate."""
        return Ceilings(max(self.bytes_per_s, other.bytes_per_s), max(self.flops_per_s, other.flops_per_s))


@dataclass(frozen=True)
class Work:
    """What one forward of one batch has to do at least, step by step (predictors and layers).

    flops: of the matrix products; moved: bytes of a step's weights and of the rows it reads and writes, each once. What
    a step keeps to itself between its products counts nothing, since it could stay in a cache.
    """

    flops: tuple[int, ...] = ()
    moved: tuple[int, ...] = ()

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.moved + other.moved)

    def bound_s(self, ceilings: Ceilings) -> float:
        """Seconds below which no implementation gets, at these rates: each step takes the longer of its two times."""
        return sum(
            max(flops / ceilings.flops_per_s, moved / ceilings.bytes_per_s)
            for flops, moved in zip(self.flops, self.moved, strict=True)
        )


def layer_parameters(shape: EncoderShape) -> int:
    """Weights, biases and LayerNorms of one layer."""
    d, f = shape.hidden, shape.ffn
    return 4 * d * d + 2 * d * f + 9 * d + f


def predictor_parameters(shape: EncoderShape) -> int:
    """Of one predictor as inference uses it: the last product only as the difference of its two rows."""
    d, m = shape.hidden, shape.predictor
    return d * m + 2 * d + 4 * m + 1 if m else 0


def encoder_work(
    shape: EncoderShape,
    lengths: Tensor,
    layer_lengths: Tensor,
    itemsize: int,
    *,
    first_token_only: bool = False,
    predictors: bool = False,
) -> Work:
    """Work of one batch.

    Args:
        lengths: int64 [sequences], tokens that arrive; layer_lengths: int64 [layers, sequences], tokens worked on.
        itemsize: bytes of a number.
        first_token_only: the last layer computes each sequence's first token only.
        predictors: there is one before every layer.
    """
    d = shape.hidden
    steps: list[tuple[int, int]] = []
    arriving = lengths
    for layer, tokens in enumerate(layer_lengths):
        count = int(tokens.sum())
        if predictors and shape.predictor:
            macs = int(shape.predictor_macs(arriving).sum())
            steps.append((2 * macs, itemsize * (predictor_parameters(shape) + int(arriving.sum()) * d)))
        cut = first_token_only and layer == shape.layers - 1
        macs = int((shape.first_token_macs(tokens) if cut else shape.layer_macs(tokens)).sum())
        written = int((tokens > 0).sum()) if cut else count
        steps.append((2 * macs, itemsize * (layer_parameters(shape) + (count + written) * d)))
        arriving = tokens
    return Work(*(tuple(part) for part in zip(*steps, strict=True)))


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Probes the machine for a second or two, with the threads that torch uses now."""
    cuda = device == "cuda"
    size = 2**30 if cuda else 2**28
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    rates = (2 * size / best_seconds(lambda: target.copy_(source), device), size / best_seconds(source.sum, device))
    rows, inner, columns = (8192, 8192, 8192) if cuda else (512, 1024, 2048)
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(columns, inner, device=device).to(dtype)
    times = [best_seconds(run, device) for run in _products(x, weight, device)]
    return Ceilings(max(rates), 2 * rows * inner * columns / min(times))


def _products(x: Tensor, weight: Tensor, device: str) -> list[Callable[[], Tensor]]:
    """PyTorch's product, and ours, which is the faster one on some processors."""
    candidates: list[Callable[[], Tensor]] = [lambda: F.linear(x, weight)]
    if device == "cpu":
        kernels = kernel_set("auto", device, x.dtype)
        packed = kernels.pack_weight(weight)
        offsets = torch.tensor([0, x.size(0)], dtype=torch.int32)
        candidates.append(lambda: kernels.ragged_linear(x, packed, None, offsets, None, "none"))
    return candidates


def best_seconds(run: Callable[[], object], device: str) -> float:
    """The shortest time of a call, of as many as fit into the time of a probe."""
    times: list[float] = []
    while not times or sum(times) < _PROBE_SECONDS:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def total(works: Sequence[Work]) -> Work:
    return sum(works, Work())
