"""`compact`, `gather_rows` and `scatter_rows` on generated batches: order, determinism, each other's inverse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import transkimmer_kernels as tk

from ..target import Target
from . import oracle
from .cases import WILD_SLOTS, Source, offsets

INT32 = torch.int32


@st.composite
def compactions(draw: st.DrawFn) -> dict[str, Any]:
    """Any lengths (long ones made of blocks), any mask, any slots; all of the tail is wild and asks to be kept."""
    lengths = draw(st.lists(st.one_of(st.integers(0, 9), st.sampled_from([63, 64, 65, 257])), max_size=12))
    count, spare = sum(lengths), draw(st.integers(0, 9))
    if draw(st.booleans()):
        keep = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    else:
        keep = [draw(st.booleans())] * count
    slots = draw(st.permutations(range(count))) if count < 100 else range(count)
    return {
        "keep": torch.tensor([*keep, *[True] * spare], dtype=torch.bool),
        "slots": torch.tensor([*slots, *(WILD_SLOTS * 3)[:spare]], dtype=INT32),
        "cu_seqlens": offsets(lengths),
        "keep_first": draw(st.booleans()),
    }


def _on(device: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}


@pytest.mark.operators("compact")
@given(kwargs=compactions())
def test_compact_equals_a_python_loop(target: Target, kwargs: dict[str, Any]) -> None:
    expected_slots, expected_cu_seqlens = oracle.compact(**kwargs)
    before = {name: x.clone() for name, x in kwargs.items() if isinstance(x, torch.Tensor)}
    moved = _on(target.device, kwargs)
    slots, cu_seqlens = target.call(tk.compact, **moved)
    again, _ = target.call(tk.compact, **moved)
    count = int(expected_cu_seqlens[-1])
    assert slots.dtype == cu_seqlens.dtype == INT32
    assert slots.shape == kwargs["slots"].shape
    assert torch.equal(cu_seqlens.cpu(), expected_cu_seqlens)
    assert torch.equal(slots[:count].cpu(), expected_slots)
    assert torch.equal(slots[:count], again[:count])
    assert all(torch.equal(moved[name].cpu(), x) for name, x in before.items()), "an input was written"


@pytest.mark.operators("compact")
@given(lengths=st.lists(st.integers(0, 20), max_size=8), rounds=st.integers(1, 4), seed=st.integers(0, 99))
def test_compact_layer_after_layer(target: Target, lengths: list[int], rounds: int, seed: int) -> None:
    """Repeated, on lists whose tails are what the round before left there: like one compaction by all masks at once."""
    source = Source(torch.float32, target.device, seed)
    batch = source.batch(lengths, spare=3)
    slots, cu_seqlens, alive = batch.slots, batch.cu_seqlens, torch.ones(batch.rows, dtype=torch.bool)
    alive = alive.to(target.device)
    for _ in range(rounds):
        row_keep = source.bits(batch.rows)
        listed = slots[: int(cu_seqlens[-1])].long()
        keep = source.bits(slots.numel())  # garbage beyond the count
        keep[: listed.numel()] = row_keep[listed]
        slots, cu_seqlens = target.call(tk.compact, keep=keep, slots=slots, cu_seqlens=cu_seqlens, keep_first=False)
        alive &= row_keep
    kept = [int(s) for s in batch.listed if alive[s]]
    assert slots[: int(cu_seqlens[-1])].tolist() == kept


@pytest.mark.operators("gather_rows", "scatter_rows")
@given(
    lengths=st.lists(st.integers(0, 20), max_size=6),
    shape=st.sampled_from([(), (1,), (7,), (3, 5)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    spare=st.integers(0, 5),
)
def test_gather_and_scatter_are_inverse(
    target: Target, lengths: list[int], shape: tuple[int, ...], dtype: torch.dtype, spare: int
) -> None:
    source = Source(torch.float32, target.device)
    batch = source.batch(lengths, spare=spare)
    lists = {"slots": batch.slots, "cu_seqlens": batch.cu_seqlens}
    x = source.normal(batch.rows, *shape, scale=100).to(dtype)
    gathered = target.call(tk.gather_rows, x=x, **lists)
    assert torch.equal(gathered[: batch.count], x[batch.listed])

    scattered = target.call(tk.scatter_rows, x=gathered, **lists, num_rows=batch.rows)
    expected = torch.zeros_like(x)
    expected[batch.listed] = x[batch.listed]
    assert torch.equal(scattered, expected)
    back = target.call(tk.gather_rows, x=scattered, **lists)
    assert torch.equal(back[: batch.count], gathered[: batch.count])


@pytest.mark.operators("gather_rows")
def test_non_contiguous_rows(target: Target) -> None:
    """A column slice is taken by value, whatever the backend wants."""
    source = Source(torch.float32, target.device)
    batch = source.batch((3, 4))
    wide = source.normal(batch.rows, 16)
    y = target.call(tk.gather_rows, x=wide[:, 3:9], slots=batch.slots, cu_seqlens=batch.cu_seqlens)
    assert torch.equal(y[: batch.count], wide[batch.listed, 3:9])


@pytest.mark.operators("scatter_rows")
@pytest.mark.parametrize("num_rows", [12, 40])
def test_scatter_into_more_rows_than_are_listed(target: Target, num_rows: int) -> None:
    source = Source(torch.float32, target.device)
    batch = source.batch((3, 4), unlisted=5)
    x = source.rows(batch.count, batch.capacity, 8)
    y = target.call(tk.scatter_rows, x=x, slots=batch.slots, cu_seqlens=batch.cu_seqlens, num_rows=num_rows)
    rest = torch.ones(num_rows, dtype=torch.bool, device=target.device)
    rest[batch.listed] = False
    assert torch.equal(y[batch.listed], x[: batch.count])
    assert y[rest].count_nonzero() == 0
