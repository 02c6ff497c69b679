"""Inputs of the operators on awkward batches, poisoned wherever a kernel must not look; for benchmarks, too.

Values depend on the seed alone, not on the device. Whatever the contract calls garbage is made to hurt: rows at and
beyond the token count, and rows that no slot names, are NaN; slots at and beyond the count are wild integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LENGTHS: dict[str, tuple[int, ...]] = {
    "empty-batch": (),
    "no-tokens": (0, 0, 0),
    "one-token": (1,),
    "tiny": (1, 0, 2, 1, 3, 0),
    "awkward": (17, 63, 0, 65, 1),
    "many-short": tuple(1 + 7 * i % 5 for i in range(60)),
    "long": (130, 300),
    "past-a-tile": (513,),
}
WILD_SLOTS = (-1, 2**31 - 1, -(2**31), 10**9)


@dataclass(frozen=True)
class Batch:
    """A ragged list over `rows` rows: shuffled distinct slots, wild beyond the token count."""

    lengths: tuple[int, ...]
    rows: int
    slots: Tensor  # int32 [capacity]
    cu_seqlens: Tensor  # int32 [batch + 1]

    @property
    def count(self) -> int:
        return sum(self.lengths)

    @property
    def capacity(self) -> int:
        return self.slots.numel()

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def listed(self) -> Tensor:
        return self.slots[: self.count].long()


def offsets(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    """int32 [batch + 1]."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


@dataclass
class Source:
    """Seeded random tensors of one dtype on one device.

    spare: capacity of a list beyond its token count; unlisted: rows that no slot names.
    """

    dtype: torch.dtype
    device: str = "cpu"
    seed: int = 0
    spare: int = 5
    unlisted: int = 7
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator) * scale + shift
        return values.to(self.device, self.dtype)

    def rows(self, count: int, capacity: int, *shape: int, scale: float = 1.0) -> Tensor:
        """[capacity, ...], NaN at and beyond `count`."""
        x = self.normal(capacity, *shape, scale=scale)
        x[count:] = torch.nan
        return x

    def listed_rows(self, batch: Batch, width: int) -> Tensor:
        """[rows, width], NaN in every row that the batch does not list."""
        x = self.normal(batch.rows, width)
        hidden = torch.full_like(x, torch.nan)
        hidden[batch.listed] = x[batch.listed]
        return hidden

    def bits(self, size: int, probability: float = 0.5) -> Tensor:
        return (torch.rand(size, generator=self.generator) < probability).to(self.device)

    def keep_weights(self, lengths: Sequence[int], capacity: int, style: str) -> Tensor:
        """fp32 [capacity] (fp64 in fp64): every non-empty sequence keeps something; NaN beyond the count.

        style: "mixed" (zeros, ones and sixteenths between, which every dtype represents), "first" (only the first
        token of a sequence) or "ones".
        """
        count, cu_seqlens = sum(lengths), offsets(lengths)
        weights = torch.randint(-16, 33, (capacity,), generator=self.generator).clamp(0, 16) / 16
        if style != "mixed":
            weights.fill_(0 if style == "first" else 1)
        weights[cu_seqlens[:-1][cu_seqlens.diff() > 0].long()] = 1
        weights[count:] = torch.nan
        return weights.to(self.device, torch.float64 if self.dtype == torch.float64 else torch.float32)

    def batch(self, lengths: Sequence[int], *, spare: int | None = None, unlisted: int | None = None) -> Batch:
        """`spare` and `unlisted` take the place of the source's own."""
        spare = self.spare if spare is None else spare
        unlisted = self.unlisted if unlisted is None else unlisted
        count, rows = sum(lengths), sum(lengths) + unlisted
        slots = torch.randperm(rows, generator=self.generator)[:count].tolist()
        tail = [WILD_SLOTS[i % len(WILD_SLOTS)] for i in range(spare)]
        slots_tensor = torch.tensor([*slots, *tail], dtype=torch.int32, device=self.device)
        return Batch(tuple(lengths), rows, slots_tensor, offsets(lengths, self.device))


Kwargs = dict[str, Any]


def compact(source: Source, lengths: Sequence[int], *, probability: float, keep_first: bool) -> Kwargs:
    batch = source.batch(lengths)
    keep = source.bits(batch.capacity, probability)
    keep[batch.count :] = True  # whoever reads the tail keeps too much
    return {"keep": keep, "slots": batch.slots, "cu_seqlens": batch.cu_seqlens, "keep_first": keep_first}


def gather_rows(source: Source, lengths: Sequence[int], *, shape: tuple[int, ...]) -> Kwargs:
    batch = source.batch(lengths)
    x = source.normal(batch.rows, *shape)
    return {"x": x, "slots": batch.slots, "cu_seqlens": batch.cu_seqlens}


def scatter_rows(source: Source, lengths: Sequence[int], *, shape: tuple[int, ...]) -> Kwargs:
    batch = source.batch(lengths)
    x = source.rows(batch.count, batch.capacity, *shape)
    return {"x": x, "slots": batch.slots, "cu_seqlens": batch.cu_seqlens, "num_rows": batch.rows}


def skim_logit(source: Source, lengths: Sequence[int], *, width: int, inner: int) -> Kwargs:
    batch = source.batch(lengths)
    return {
        "hidden": source.listed_rows(batch, width),
        "slots": batch.slots,
        "cu_seqlens": batch.cu_seqlens,
        "norm1_weight": source.normal(width, scale=0.2, shift=1.0),
        "norm1_bias": source.normal(width, scale=0.2),
        "fc_weight": source.normal(inner, width, scale=width**-0.5),
        "fc_bias": source.normal(inner, scale=0.2),
        "norm2_weight": source.normal(inner, scale=0.2, shift=1.0),
        "norm2_bias": source.normal(inner, scale=0.2),
        "out_weight": source.normal(inner, scale=inner**-0.5),
        "out_bias": source.normal(1, shift=3.0),
    }


def skim_tokens(source: Source, lengths: Sequence[int], *, width: int, inner: int, keep_first: bool) -> Kwargs:
    """Thresholded where about half of the tokens go."""
    weights = skim_logit(source, lengths, width=width, inner=inner)
    return {**weights, "logit_threshold": 3.0, "keep_first": keep_first}


def encoder_layer_(
    source: Source,
    lengths: Sequence[int],
    *,
    width: int,
    heads: int,
    ff: int,
    first_only: bool = False,
    bias: bool = True,
    activation: str = "gelu",
) -> Kwargs:
    batch = source.batch(lengths)

    def matrix(name: str, out: int, size: int) -> Kwargs:
        weight = source.normal(out, size, scale=size**-0.5)
        return {f"{name}_weight": weight, f"{name}_bias": source.normal(out, scale=0.2) if bias else None}

    kwargs = {
        "hidden": source.listed_rows(batch, width),
        "slots": batch.slots,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.longest + 3,
        "num_heads": heads,
        **matrix("qkv", (2 if first_only else 3) * width, width),
        **matrix("out", width, width),
        **matrix("ffn_in", ff, width),
        **matrix("ffn_out", width, ff),
        "activation": activation,
    }
    for norm in ("norm1", "norm2"):
        kwargs[f"{norm}_weight"] = source.normal(width, scale=0.2, shift=1.0)
        kwargs[f"{norm}_bias"] = source.normal(width, scale=0.2)
    return kwargs | (matrix("query", width, width) if first_only else {})


def ragged_attention(
    source: Source,
    lengths: Sequence[int],
    *,
    heads: int = 2,
    head_dim: int = 32,
    key_lengths: Sequence[int] | None = None,
    keep: str | None = None,
    importance: bool = False,
    scale: float | None = None,
    layout: str = "fused",
    spare: int = 5,
) -> Kwargs:
    """layout: "fused" (views of one [capacity, 3, H, D] projection), "heads-first" (as if from [H, n, D]) or "dense".

    With `key_lengths` queries and keys have lengths of their own and keys and values share a projection.
    """
    keys = lengths if key_lengths is None else key_lengths
    capacity_q, capacity_k = sum(lengths) + spare, sum(keys) + spare
    if layout == "heads-first":
        # Garbage is placed through the view, whose rows are the second dimension of the memory.
        q, k, v = (
            source.normal(heads, size, head_dim).transpose(0, 1) for size in (capacity_q, capacity_k, capacity_k)
        )
    elif key_lengths is None and layout == "fused":
        q, k, v = source.normal(capacity_q, 3, heads, head_dim).unbind(1)
    else:
        q = source.normal(capacity_q, heads, head_dim)
        k, v = source.normal(capacity_k, 2, heads, head_dim).unbind(1)
        k, v = (k, v) if layout == "fused" else (k.contiguous(), v.contiguous())
    for x, count in ((q, sum(lengths)), (k, sum(keys)), (v, sum(keys))):
        x[count:] = torch.nan
    return {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": offsets(lengths, source.device),
        "cu_seqlens_k": offsets(keys, source.device),
        "max_seqlen_q": max(lengths, default=0),
        "max_seqlen_k": max(keys, default=0) + 3,  # an upper bound, not a maximum
        "scale": scale,
        "keep": None if keep is None else source.keep_weights(keys, capacity_k, keep),
        "return_importance": importance,
    }


def embed_tokens(
    source: Source,
    lengths: Sequence[int],
    *,
    width: int,
    positions: str | None = "each",
    types: str | None = "each",
    vocabulary: int = 50,
    id_dtype: torch.dtype = torch.int64,
) -> Kwargs:
    """positions, types: ids for "each" token, of one sequence for "all", or None; types "unknown": not even a table."""
    shape = (len(lengths), max(lengths, default=0))

    def ids(kind: str | None, size: int) -> Tensor | None:
        if kind not in ("each", "all"):
            return None
        found = torch.randint(size, shape if kind == "each" else (1, shape[1]), generator=source.generator)
        return found.to(source.device, id_dtype)

    return {
        "input_ids": ids("each", vocabulary),
        "position_ids": ids(positions, shape[1] + 3),
        "token_type_ids": ids(types, 2),
        "word_weight": source.normal(vocabulary, width),
        "position_weight": source.normal(shape[1] + 3, width),
        "type_weight": None if types == "unknown" else source.normal(2, width),
        "norm_weight": source.normal(width, scale=0.2, shift=1.0),
        "norm_bias": source.normal(width, scale=0.2),
    }


def add_norm(source: Source, lengths: Sequence[int], *, width: int, alone: bool = False) -> Kwargs:
    rows = sum(lengths)
    return {
        "x": source.normal(rows, width, shift=0.5),
        "residual": None if alone else source.normal(rows, width, scale=2.0),
        "weight": source.normal(width, scale=0.2, shift=1.0),
        "bias": source.normal(width, scale=0.2),
    }


def choose_rows(source: Source, lengths: Sequence[int], *, width: int) -> Kwargs:
    rows = sum(lengths)
    weights = torch.float64 if source.dtype == torch.float64 else torch.float32
    return {
        "keep": (torch.rand(rows, generator=source.generator) < 0.5).to(source.device, weights),
        "hidden": source.normal(rows, width),
        "final": source.normal(rows, width),
    }


def ragged_linear(
    source: Source,
    lengths: Sequence[int],
    *,
    width: int,
    out: int,
    bias: bool = True,
    gather: bool = True,
    activation: str = "none",
) -> Kwargs:
    batch = source.batch(lengths)
    return {
        "x": source.listed_rows(batch, width) if gather else source.rows(batch.count, batch.capacity, width),
        "weight": source.normal(out, width, scale=width**-0.5),
        "bias": source.normal(out) if bias else None,
        "cu_seqlens": batch.cu_seqlens,
        "slots": batch.slots if gather else None,
        "activation": activation,
    }


def _norm_tail(source: Source, width: int, out: int, bias: bool) -> Kwargs:
    return {
        "weight": source.normal(out, width, scale=width**-0.5),
        "bias": source.normal(out) if bias else None,
        "norm_weight": source.normal(out, scale=0.2, shift=1.0),
        "norm_bias": source.normal(out, scale=0.2),
    }


def ragged_linear_norm(
    source: Source, lengths: Sequence[int], *, width: int, out: int, bias: bool = True, gather: bool = True
) -> Kwargs:
    batch = source.batch(lengths)
    return {
        "x": source.rows(batch.count, batch.capacity, width),
        "residual": source.listed_rows(batch, out) if gather else source.rows(batch.count, batch.capacity, out),
        "residual_slots": batch.slots if gather else None,
        "cu_seqlens": batch.cu_seqlens,
        **_norm_tail(source, width, out, bias),
    }


def ragged_linear_norm_(source: Source, lengths: Sequence[int], *, width: int, out: int, bias: bool = True) -> Kwargs:
    batch = source.batch(lengths)
    return {
        "hidden": source.normal(batch.rows, out),
        "slots": batch.slots,
        "x": source.rows(batch.count, batch.capacity, width),
        "residual": source.rows(batch.count, batch.capacity, out),
        "cu_seqlens": batch.cu_seqlens,
        **_norm_tail(source, width, out, bias),
    }


@dataclass(frozen=True)
class Case:
    """One operator on one batch: `make` gives the keyword arguments of its public function."""

    build: Callable[..., Kwargs]
    lengths: str
    options: Kwargs
    backends: tuple[str, ...] | None = None  # None: promised by every backend

    @property
    def operator(self) -> str:
        return self.build.__name__

    def __str__(self) -> str:
        options = "-".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.operator}-{self.lengths}-{options}".replace(" ", "")

    def make(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Kwargs:
        return self.build(Source(dtype, device, seed), LENGTHS[self.lengths], **self.options)
