"""How the product is cut into tiles, and whether it is ours at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...tuning import Tunable


class Tiling(NamedTuple):
    """How the product of a dtype is cut; sizes are M, N, K."""

    large: tuple[int, int, int]
    small: tuple[int, int, int]
    programs: int  # per multiprocessor: as many as fit on it at once
    fewest_large: float  # per multiprocessor, below which small tiles are sooner done
    num_warps: int
    num_stages: int
    strategy: str = "triton"  # or a library's product, see `strategies`


# Chosen by what compiles without spilling for sm_80, sm_90 and sm_100, and by counting loads; not measured on a GPU.
# Half precision: a large tile loads half as much per multiply-add as a small one, whose rate the L2 cache bounds; so a
# large tile is worth half of the multiprocessors standing idle. fp32 has no such matrix instruction (TF32 would be too
# coarse), and its multiply-adds bound the rate of either tile: there it is a matter of filling the device.
_HALF = Tiling((128, 128, 64), (64, 64, 64), programs=1, fewest_large=0.5, num_warps=8, num_stages=4)
_SINGLE = Tiling((128, 64, 16), (64, 32, 16), programs=2, fewest_large=2.0, num_warps=4, num_stages=3)


def default(dtype: torch.dtype, size_out: int, size_in: int) -> Tiling:
    return _SINGLE if dtype == torch.float32 else _HALF


def candidates(dtype: torch.dtype, size_out: int, size_in: int) -> Iterator[Tiling]:
    """Shapes and depths around the default; for half precision the libraries' products, too."""
    base = default(dtype, size_out, size_in)
    if dtype == torch.float32:
        for large, stages in itertools.product(((128, 64, 16), (64, 64, 16), (64, 64, 32)), (2, 3)):
            yield base._replace(large=large, num_stages=stages)
    else:
        larges = ((128, 128, 64), (128, 64, 64), (64, 128, 64), (128, 256, 64))
        for large, stages, warps in itertools.product(larges, (3, 4), (4, 8)):
            yield base._replace(large=large, num_stages=stages, num_warps=warps)
        for small, fewest in itertools.product(((64, 64, 64), (32, 64, 64), (64, 32, 128)), (0.25, 0.5, 1.0)):
            yield base._replace(small=small, fewest_large=fewest)
        yield base._replace(programs=2, num_stages=3, num_warps=4)
    for strategy in ("grouped_mm", "capacity"):
        yield base._replace(strategy=strategy)


TUNABLE = Tunable("ragged_linear", default, candidates)
