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
    few: tuple[int, int, int]  # of up to most_split rows, where the inner dimension is split
    programs: int  # per multiprocessor: as many as fit on it at once
    fewest_large: float  # per multiprocessor, below which small tiles are sooner done
    num_warps: int
    num_stages: int
    split: int = 1  # programs that share a tile then, along the inner dimension; 1: no split
    most_split: int = 0
    strategy: str = "triton"  # or a library's product, see `strategies`


# Chosen by what compiles without spilling for sm_80, sm_90 and sm_100, and by counting loads; what was measured is in
# configs/.
# Half precision: a large tile loads half as much per multiply-add as a small one, whose rate the L2 cache bounds; so a
# large tile is worth half of the multiprocessors standing idle. fp32 has no such matrix instruction (TF32 would be too
# coarse), and its multiply-adds bound the rate of either tile: there it is a matter of filling the device.
_HALF = Tiling((128, 128, 64), (64, 64, 64), (64, 64, 64), programs=1, fewest_large=0.5, num_warps=8, num_stages=4)
_SINGLE = Tiling((64, 64, 16), (64, 32, 16), (64, 32, 16), programs=2, fewest_large=2.0, num_warps=4, num_stages=3)


def default(dtype: torch.dtype, size_out: int, size_in: int) -> Tiling:
    if dtype == torch.float32:
        return _SINGLE
    # Up to about 512 rows, small tiles are fewer than the multiprocessors of a large device.
    return _HALF._replace(split=4 if size_in > size_out else 2, most_split=512)


def candidates(dtype: torch.dtype, size_out: int, size_in: int) -> Iterator[Tiling]:
    """Shapes and depths around the default; for half precision also the libraries' products."""
    base = default(dtype, size_out, size_in)
    if dtype == torch.float32:
        for large, stages in itertools.product(((64, 64, 16), (64, 32, 16), (64, 64, 32)), (2, 3)):
            yield base._replace(large=large, num_stages=stages)
    else:
        for large, stages, warps in (((128, 256, 64), 3, 8), ((128, 256, 64), 4, 8), ((128, 128, 64), 3, 4)):
            yield base._replace(large=large, num_stages=stages, num_warps=warps)
        for small in ((64, 128, 64), (64, 64, 128), (64, 32, 128)):
            yield base._replace(small=small)
        if size_out <= size_in:  # where a LayerNorm follows
            for few, split in itertools.product(((64, 64, 64), (64, 64, 128), (64, 32, 128)), (1, 2, 4, 8)):
                yield base._replace(few=few, split=split)
            for most in (128, 1024):
                yield base._replace(most_split=most)
        for fewest in (0.25, 0.75, 1.0):
            yield base._replace(fewest_large=fewest)
    for strategy in ("grouped_mm", "capacity"):
        yield base._replace(strategy=strategy)


TUNABLE = Tunable("ragged_linear", default, candidates)
