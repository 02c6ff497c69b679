"""How the predictor's product is cut into tiles, and in which form the predictor runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton

from ...tuning import Tunable


class Tiling(NamedTuple):
    """Rows x inner columns of a program of the fused product, and the length of its steps; or that it does not run."""

    rows: int
    columns: int
    k: int
    num_warps: int
    num_stages: int
    form: str = "fused"  # or "steps"


def default(dtype: torch.dtype, width: int, inner: int) -> Tiling:
    """In steps, which an H200 computes faster (docs/gpu.md); fp32 and tiles: by what compiles without spilling."""
    # Statistics are computed once per column tile: few wide tiles, unless much of the last one would be empty.
    wide = 128 < inner <= 256 or inner % 256 == 0
    if dtype == torch.float32:  # plain multiply-adds: operands live in registers, so tiles are small
        tile = Tiling(16, 256, 16, 8, num_stages=3) if wide else Tiling(32, 64, 16, 4, num_stages=3)
    else:
        tile = Tiling(64, 256, 64, 8, num_stages=3) if wide else Tiling(64, 128, 64, 4, num_stages=3)
        tile = tile._replace(form="steps")
    return tile._replace(columns=min(tile.columns, _widest(inner)))


def _widest(inner: int) -> int:
    """Columns of a tile that holds a whole inner row."""
    return max(16, triton.next_power_of_2(inner))


def candidates(dtype: torch.dtype, width: int, inner: int) -> Iterator[Tiling]:
    """The other form, and shapes and depths of fused tiles."""
    half = dtype != torch.float32
    yield default(dtype, width, inner)._replace(form="fused" if half else "steps")
    rows, k, stages = ((32, 64, 128), 64, (2, 3, 4)) if half else ((16, 32, 64), 16, (2, 3))
    for tile in itertools.product(rows, (64, 128, 256), (k,), (4, 8), stages):
        if tile[1] <= _widest(inner):
            yield Tiling(*tile)


TUNABLE = Tunable("skim_logit", default, candidates)
