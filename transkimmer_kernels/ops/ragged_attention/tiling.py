"""How attention is cut into tiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...tuning import Tunable

LARGEST_HEAD = 128


class Tiling(NamedTuple):
    """Queries and keys in a block of the forward, for either kind of tile; rows of the other kernels."""

    aligned: tuple[int, int]
    packed: tuple[int, int]
    short: int  # mean number of keys per sequence up to which tiles are packed
    programs: int  # of the forward, per multiprocessor: as many as fit on it at once
    num_warps: int
    num_stages: int
    own: int  # rows that a program of the backward and of the importance owns
    passing: int  # rows of what passes by
    backward_warps: int
    backward_stages: int

    def forward_options(self) -> dict[str, int]:
        names = ("BM", "BN", "PACKED_M", "PACKED_N", "SHORT", "num_warps", "num_stages")
        values = (*self.aligned, *self.packed, self.short, self.num_warps, self.num_stages)
        # Left to itself, the assembler stops at 80 or 128 registers for the sake of occupancy, and spills.
        return {**dict(zip(names, values, strict=True)), "maxnreg": 255}

    def backward_options(self, own: str, passing: str) -> dict[str, int]:
        options = {"num_warps": self.backward_warps, "num_stages": self.backward_stages}
        return {own: self.own, passing: self.passing, **options}


# A mean of 24 keys: about there either kind of tile is as full (`benchmarks/attention_tiles.py`).
_HALF = Tiling((64, 32), (64, 32), 24, 2, 4, 2, own=64, passing=32, backward_warps=4, backward_stages=2)
_SINGLE = Tiling((32, 32), (32, 32), 24, 1, 8, 2, own=32, passing=32, backward_warps=8, backward_stages=2)
_DEFAULTS = {
    (True, 32): _HALF,
    (True, 64): _HALF,
    (True, 128): _HALF._replace(programs=1, num_warps=8, backward_warps=8),
    (False, 32): _SINGLE,
    (False, 64): _SINGLE,
    (False, 128): _SINGLE._replace(aligned=(32, 16), packed=(32, 16), own=16, passing=16, backward_stages=3),
}


def default(dtype: torch.dtype, head_dim: int) -> Tiling:
    """What compiles without spilling for sm_80, sm_90 and sm_100, by Triton 3.6 and 3.9; not measured on a GPU.

    In fp32 there are plain multiply-adds only: operands live in registers, so blocks are small. In half precision 64
    rows are what a warpgroup's matrix instruction takes.
    """
    if head_dim > LARGEST_HEAD:
        raise ValueError(f"q: the Triton kernels take a head_dim of at most {LARGEST_HEAD}, got {head_dim}")
    size = next(size for size in (32, 64, 128) if head_dim <= size)
    return _DEFAULTS[dtype != torch.float32, size]


def candidates(dtype: torch.dtype, head_dim: int) -> Iterator[Tiling]:
    """Other tiles of the forward, and other places to change from packed to aligned ones."""
    base = default(dtype, head_dim)
    if dtype == torch.float32:
        blocks: tuple[tuple[int, int], ...] = ((32, 16), (32, 32), (64, 16))
        packed = blocks[:2]
    else:
        blocks, packed = ((64, 32), (64, 64), (128, 32), (128, 64), (128, 128)), ((32, 32), (64, 32), (64, 64))
    for aligned, warps, stages in itertools.product(blocks, (4, 8), (2, 3)):
        yield base._replace(aligned=aligned, num_warps=warps, num_stages=stages)
    for block, short, programs in itertools.product(packed, (16, 32, 64, 128), (1, 2)):
        yield base._replace(packed=block, short=short, programs=programs)


TUNABLE = Tunable("ragged_attention", default, candidates)
