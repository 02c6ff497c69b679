"""`Ragged`: what enters at the door, in which order, and where a sequence's first token is."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from transkimmer_kernels import KernelSet, Ragged, kernel_set
from transkimmer_kernels.ops.encoder_layer.compose import first_tokens
from transkimmer_kernels.ragged import first_of_each

from ..ops.cases import offsets
from ..target import Target


@pytest.fixture(scope="session")
def kernels(target: Target) -> KernelSet:
    target.require("compact")
    return kernel_set(target.backend, target.device)


MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "holes": [[1, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]],
    "empty-sequences": [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
    "nothing": [[0, 0, 0, 0]] * 3,
}


def listed(batch: Ragged) -> list[list[int]]:
    """The slots of each sequence."""
    bounds = batch.cu_seqlens.tolist()
    return [batch.slots[a:b].tolist() for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("padding", MASKS)
def test_from_padded(kernels: KernelSet, padding: str, mask_dtype: torch.dtype) -> None:
    """Padded on any side, or with holes: a token's slot is its place in the flattened padded layout."""
    mask = MASKS[padding]
    hidden = torch.randn(3, 4, 6, device=kernels.device_type)
    batch = Ragged.from_padded(hidden, torch.tensor(mask, device=hidden.device).to(mask_dtype), kernels)
    assert listed(batch) == [[4 * b + i for i in range(4) if mask[b][i]] for b in range(3)]
    assert (batch.batch, batch.capacity, batch.max_seqlen) == (3, 12, 4)
    assert batch.hidden.data_ptr() == hidden.data_ptr(), "contiguous states must not be copied"
    assert torch.equal(batch.hidden, hidden.view(12, 6))


def test_any_number_but_zero_is_a_real_token(kernels: KernelSet) -> None:
    hidden = torch.randn(1, 3, 6, device=kernels.device_type)
    mask = torch.tensor([[-1.0, 0.0, 2.0]], device=hidden.device)
    assert listed(Ragged.from_padded(hidden, mask, kernels)) == [[0, 2]]


@pytest.mark.parametrize("layout", ["slice", "sequence-first", "expanded"])
def test_from_padded_takes_views_by_value(kernels: KernelSet, layout: str) -> None:
    """A mask or states with strides: kernels read and write dense ones."""
    hidden = torch.randn(3, 4, 6, device=kernels.device_type)
    mask = torch.tensor(MASKS["holes"], dtype=torch.bool, device=hidden.device)
    expected = [[0, 2, 3], [5, 7], [9, 10]]
    if layout == "slice":
        states, flags = torch.cat([hidden, hidden.neg()], 2)[..., :6], torch.stack([mask, ~mask], 2)[..., 0]
    elif layout == "sequence-first":
        states, flags = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (hidden, mask))
    else:
        states, hidden = hidden[:1].expand(3, -1, -1), hidden[:1].repeat(3, 1, 1)
        flags = torch.ones(1, 1, dtype=torch.bool, device=hidden.device).expand(3, 4)
        expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    batch = Ragged.from_padded(states, flags, kernels)
    assert not states.is_contiguous() and not flags.is_contiguous()
    assert listed(batch) == expected
    assert batch.hidden.is_contiguous() and torch.equal(batch.hidden, hidden.view(12, 6))


def test_from_padded_without_mask(kernels: KernelSet) -> None:
    batch = Ragged.from_padded(torch.randn(2, 3, 4, device=kernels.device_type), None, kernels)
    assert listed(batch) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(("size", "length"), [(0, 5), (4, 0)])
def test_from_padded_of_nothing(kernels: KernelSet, size: int, length: int) -> None:
    hidden = torch.randn(size, length, 6, device=kernels.device_type)
    for mask in (None, hidden.new_ones(size, length)):
        assert listed(Ragged.from_padded(hidden, mask, kernels)) == [[]] * size


def test_from_padded_refuses(kernels: KernelSet) -> None:
    hidden = torch.randn(2, 3, 4, device=kernels.device_type)
    with pytest.raises(ValueError, match=r"^hidden: expected 3 dimensions"):
        Ragged.from_padded(hidden[0], None, kernels)
    with pytest.raises(ValueError, match=r"^mask: expected shape \[2, 3\]"):
        Ragged.from_padded(hidden, hidden.new_ones(2, 4), kernels)
    with pytest.raises(ValueError, match=r"^mask: expected device"):
        Ragged.from_padded(hidden, torch.ones(2, 3, device="meta"), kernels)


def test_from_packed() -> None:
    hidden = torch.randn(6, 4)
    batch = Ragged.from_packed(hidden, offsets((2, 0, 4)))
    assert listed(batch) == [[0, 1], [], [2, 3, 4, 5]]
    assert batch.hidden is hidden
    assert batch.max_seqlen >= 4
    assert Ragged.from_packed(hidden, offsets((2, 0, 4)), max_seqlen=5).max_seqlen == 5


def test_from_packed_takes_views_by_value() -> None:
    hidden, cu_seqlens = torch.randn(6, 8), offsets((2, 0, 4))
    batch = Ragged.from_packed(hidden[:, 2:6], torch.stack([cu_seqlens, -cu_seqlens], 1)[:, 0])
    assert listed(batch) == [[0, 1], [], [2, 3, 4, 5]]
    assert batch.hidden.is_contiguous() and batch.cu_seqlens.is_contiguous()
    assert torch.equal(batch.hidden, hidden[:, 2:6])


@pytest.mark.parametrize(
    ("rows", "cu_seqlens", "max_seqlen", "message"),
    [
        (6, offsets((2, 3)), None, "^cu_seqlens: ends at 5, but there are 6 tokens"),
        (6, offsets((2, 5)), None, "^cu_seqlens: its last entry, 7 tokens, exceeds"),
        (6, offsets((6,)).long(), None, "^cu_seqlens: expected dtype torch.int32"),
        (6, offsets((2, 4)), 3, "^max_seqlen: must be at least the longest sequence, 4, got 3"),
    ],
)
def test_from_packed_refuses(rows: int, cu_seqlens: Tensor, max_seqlen: int | None, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Ragged.from_packed(torch.randn(rows, 4), cu_seqlens, max_seqlen)


@given(data=st.data(), lengths=st.lists(st.integers(0, 6), max_size=6))
def test_first_tokens_and_keep(kernels: KernelSet, data: st.DataObject, lengths: list[int]) -> None:
    """After any number of removals, the first token of a sequence is the first survivor in its list."""
    count = sum(lengths)
    batch = Ragged.from_packed(torch.zeros(count, 1, device=kernels.device_type), offsets(lengths, kernels.device_type))
    expected = [list(range(end - n, end)) for n, end in zip(lengths, offsets(lengths).tolist()[1:], strict=True)]
    for keep_first in data.draw(st.lists(st.booleans(), max_size=3)):
        keep = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
        flat = iter(keep)
        expected = [[s for i, s in enumerate(row) if next(flat) or (keep_first and i == 0)] for row in expected]
        batch.keep(torch.tensor(keep, dtype=torch.bool, device=batch.slots.device), kernels, keep_first=keep_first)
        assert listed(batch) == expected
    first, cu_first = first_tokens(batch.slots, batch.cu_seqlens, kernels)
    assert first.dtype == cu_first.dtype == torch.int32
    assert first.shape == (min(len(lengths), count),)
    assert first[: int(cu_first[-1])].tolist() == [row[0] for row in expected if row]
    assert cu_first.diff().tolist() == [int(bool(row)) for row in expected]


def test_an_empty_last_sequence_has_no_first_token() -> None:
    assert first_of_each(offsets((2, 0)), 2).tolist() == [True, False]
    assert first_of_each(offsets((0, 1, 2)), 3).tolist() == [True, True, False]
