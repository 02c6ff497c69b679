"""Sequences so short that a kernel puts several into one tile: that they share nothing else."""

from __future__ import annotations

import pytest
import torch

import transkimmer_kernels as tk

from ..target import DTYPES, TARGETS, Target
from . import cases, oracle
from .cases import Source
from .closeness import assert_close_as_torch
from .operators import SPECS

SPEC = SPECS["ragged_attention"]
LENGTHS = (9, 1, 0, 20, 7, 40, 3, 5, 64, 2)  # fewer tokens than three tiles
OWN = slice(10, 30)  # the fourth sequence
with_dtypes = pytest.mark.parametrize(
    ("target", "dtype"),
    [pytest.param(t, d, id=f"{t}-{d}") for t in TARGETS for d in DTYPES[t.backend]],
)
attention = pytest.mark.operators("ragged_attention")


@attention
@with_dtypes
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("poisoned", ["q", "k", "v"])
def test_neighbours_do_not_matter_bit_for_bit(target: Target, dtype: torch.dtype, head_dim: int, poisoned: str) -> None:
    kwargs = cases.ragged_attention(Source(dtype, target.device), LENGTHS, head_dim=head_dim, importance=True)
    expected = target.call(tk.ragged_attention, **kwargs)
    for foreign in (torch.nan, torch.inf):
        x = kwargs[poisoned].clone()
        x[: OWN.start], x[OWN.stop :] = foreign, foreign
        out, lse, importance = target.call(tk.ragged_attention, **{**kwargs, poisoned: x})
        assert torch.equal(out[OWN], expected[0][OWN])
        assert torch.equal(lse[:, OWN], expected[1][:, OWN])
        assert torch.equal(importance[OWN], expected[2][OWN])


@attention
@with_dtypes
def test_a_broken_value_shows_in_its_own_sequence(target: Target, dtype: torch.dtype) -> None:
    kwargs = cases.ragged_attention(Source(dtype, target.device), LENGTHS, head_dim=64)
    kwargs["v"] = kwargs["v"].clone()
    kwargs["v"][OWN.start + 3, 1, 5] = torch.nan
    out, _, _ = target.call(tk.ragged_attention, **kwargs)
    broken = out[: sum(LENGTHS)].isnan().cpu()
    assert broken[OWN, 1, 5].all()
    assert broken.sum() == LENGTHS[3]


@attention
@with_dtypes
@pytest.mark.parametrize("lengths", [(64,) * 5, (128, 1, 127, 0, 128), (1,) * 200, (63, 65, 16, 48)], ids=str)
@pytest.mark.parametrize("keep", [None, "mixed"])
def test_tiles_that_are_just_full(
    target: Target, dtype: torch.dtype, lengths: tuple[int, ...], keep: str | None
) -> None:
    kwargs = cases.ragged_attention(Source(dtype, target.device), lengths, importance=True, keep=keep)
    kwargs["max_seqlen_k"] = max(lengths)
    actual = oracle.valid("ragged_attention", kwargs, target.call(tk.ragged_attention, **kwargs))
    truth, yardstick = SPEC.oracle(kwargs, torch.float64), SPEC.oracle(kwargs, dtype)
    terms = SPEC.terms(kwargs, actual[0])
    for name, ours, exact, plain in zip(SPEC.outputs, actual, truth, yardstick, strict=True):
        assert_close_as_torch(ours, exact, plain, name=name, terms=terms.get(name))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_captured_graph_follows_the_lengths(dtype: torch.dtype) -> None:
    """Captured once and replayed with other lengths in the same capacity: the bits of a direct call."""
    Target("cuda", "cuda").require("ragged_attention")
    kwargs = cases.ragged_attention(Source(dtype, "cuda"), LENGTHS, head_dim=64, importance=True, spare=0)
    kwargs["max_seqlen_q"] = kwargs["max_seqlen_k"] = 64
    offsets = kwargs["cu_seqlens_q"].clone()
    kwargs["cu_seqlens_q"] = kwargs["cu_seqlens_k"] = offsets
    tk.ragged_attention(**kwargs, kernels="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tk.ragged_attention(**kwargs, kernels="cuda")
    for lengths in (LENGTHS, LENGTHS[::-1], (0,) * len(LENGTHS), (64, 0, 1, 0, 17, 0, 0, 64, 0, 5)):
        offsets.copy_(cases.offsets(lengths, "cuda"))
        graph.replay()
        direct = tk.ragged_attention(**kwargs, kernels="cuda")
        count = sum(lengths)
        for ours, wanted in zip(captured, direct, strict=True):
            part = (slice(None), slice(count)) if ours.dim() == 2 else slice(count)
            assert torch.equal(ours[part], wanted[part])
