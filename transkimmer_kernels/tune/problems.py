"""Inputs of a shape class: what a configuration is measured on.

A kernel sees the capacity of the whole batch and a row count that shrinks from layer to layer. So one configuration
has to serve both a full batch and what is left of it, and is measured on several counts under one capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops, triton_support
from ..ops.skim_logit import WEIGHTS
from ..tuning import Tunable

# (capacity, rows that count)
ROWS = ((8192, 8192), (8192, 3000), (8192, 1000), (8192, 300), (8192, 50))

# (kernels, dtype) -> the valid rows of the result, computed by these kernels in this dtype
Call = Callable[[str, torch.dtype], Tensor]


@dataclass(frozen=True)
class Problem:
    """sizes: shape classes to measure, without the dtype; make: (dtype, sizes, rows, device) -> the call to measure."""

    sizes: tuple[tuple[int, ...], ...]
    make: Callable[[torch.dtype, tuple[int, ...], tuple[int, int], torch.device], Call]


class _Arguments:
    """Seeded tensors, each also in other dtypes; in its own dtype it is the same tensor at every call."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale + shift).to(self.device, self.dtype)

    def listed(self, capacity: int, count: int) -> tuple[Tensor, Tensor]:
        """(slots, cu_seqlens) of `count` tokens in sequences of 32, spread over `capacity` rows."""
        order = torch.randperm(capacity, generator=self.generator)
        slots = torch.cat([order[:count].sort().values, order[count:]]).to(self.device, torch.int32)
        ends = torch.arange(0, count + 32, 32).clamp(max=count)
        return slots, ends.to(self.device, torch.int32)


def _ragged_linear(dtype: torch.dtype, sizes: tuple[int, ...], rows: tuple[int, int], device: torch.device) -> Call:
    """With what stands around the product of that shape in an encoder layer."""
    (size_out, size_in), (capacity, count) = sizes, rows
    make = _Arguments(dtype, device)
    slots, cu_seqlens = make.listed(capacity, count)
    x = make.normal(capacity, size_in)
    weight, bias = make.normal(size_out, size_in, scale=size_in**-0.5), make.normal(size_out)
    if size_out > size_in:
        gathered = size_out == 3 * size_in  # query, key and value at once; else the FFN's first product

        def call(kernels: str, precision: torch.dtype) -> Tensor:
            tensors = x.to(precision), weight.to(precision), bias.to(precision)
            if gathered:
                return ops.ragged_linear(*tensors, cu_seqlens, slots=slots, kernels=kernels)[:count]
            return ops.ragged_linear(*tensors, cu_seqlens, activation="gelu", kernels=kernels)[:count]

        return call
    others = make.normal(capacity, size_out), make.normal(size_out, scale=0.2, shift=1.0), make.normal(size_out)

    def call_norm(kernels: str, precision: torch.dtype) -> Tensor:
        tensors = x.to(precision), weight.to(precision), bias.to(precision)
        residual, gain, shift = (t.to(precision) for t in others)
        y = ops.ragged_linear_norm(*tensors, residual, gain, shift, cu_seqlens, residual_slots=slots, kernels=kernels)
        return y[:count]

    return call_norm


def _skim_logit(dtype: torch.dtype, sizes: tuple[int, ...], rows: tuple[int, int], device: torch.device) -> Call:
    (width, inner), (capacity, count) = sizes, rows
    make = _Arguments(dtype, device)
    slots, cu_seqlens = make.listed(capacity, count)
    hidden = make.normal(capacity, width)
    shapes = ((width,), (width,), (inner, width), (inner,), (inner,), (inner,), (inner,), (1,))
    weights = []
    for name, shape in zip(WEIGHTS, shapes, strict=True):
        is_gain = name in ("norm1_weight", "norm2_weight")
        weights.append(make.normal(*shape, scale=shape[-1] ** -0.5, shift=float(is_gain)))

    def call(kernels: str, precision: torch.dtype) -> Tensor:
        predictor = [weight.to(precision) for weight in weights]
        return ops.skim_logit(hidden.to(precision), slots, cu_seqlens, *predictor, kernels=kernels)[:count]

    return call


def _ragged_attention(dtype: torch.dtype, sizes: tuple[int, ...], rows: tuple[int, int], device: torch.device) -> Call:
    """sizes: the head size. A sequence per 64 rows there are, however few are left of it; as wide as BERT-base."""
    (head_dim,), (capacity, count) = sizes, rows
    make, batch = _Arguments(dtype, device), max(capacity // 64, 1)
    projected = make.normal(capacity, 3, max(768 // head_dim, 1), head_dim)
    cu_seqlens = (torch.arange(batch + 1) * count // batch).to(device, torch.int32)
    longest = 2 * capacity // batch + 1  # an upper bound

    def call(kernels: str, precision: torch.dtype) -> Tensor:
        q, k, v = projected.to(precision).unbind(1)
        out, _, _ = ops.ragged_attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest, kernels=kernels)
        return out[:count]

    return call


def _layers(widths: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    for width in widths:
        yield from ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))


# MiniLM's, BERT-base's and BERT-large's.
_WIDTHS = (384, 768, 1024)
# The operators that can be tuned, or will be: `tunables` says which can.
PROBLEMS = {
    "ragged_linear": Problem(tuple(_layers(_WIDTHS)), _ragged_linear),
    "ragged_attention": Problem(((32,), (64,), (128,)), _ragged_attention),
    "skim_logit": Problem(tuple((width, width) for width in _WIDTHS), _skim_logit),
}


def tunables() -> dict[str, Tunable[Any]]:
    """operator -> what its `triton.py` exposes; operators without a choice are not among them."""
    exposed = (getattr(module, "TUNABLE", None) for module in triton_support.backend_modules().values())
    return {tunable.operator: tunable for tunable in exposed if tunable is not None}
