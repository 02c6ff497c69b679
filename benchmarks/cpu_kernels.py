"""Native CPU operators against the best way to the same result without them, on BERT-base shapes and real lengths.

    python -m benchmarks.cpu_kernels [--dtype bf16] [--json FILE]

That way is plain PyTorch, with its products on weights packed once for oneDNN where it can; for the operators made of
several others, it is those others. Both sides have to agree before they are timed.
A native kernel stays only where it wins here. Contenders take turns; times are medians of the repeats, a ratio above
1 means that ours is faster. Between two timed calls a buffer larger than the caches is read, as a product's weights
are in a model; `hot` leaves that out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transkimmer.bench.field import TOLERANCES
from transkimmer.bench.workload import DTYPES, known_lengths

from transkimmer_kernels import kernel_set
from transkimmer_kernels.cpu_products import pack_weight
from transkimmer_kernels.onednn import can_pack
from transkimmer_kernels.ops.encoder_layer.compose import compose_layer_

from .single_runs import median_seconds, write

WIDTH, HEADS, FFN = 768, 12, 3072
BATCH = 16
KEPT = (1.0, 0.5, 0.15)
CACHE_BYTES = 96 * 2**20


@dataclass
class Case:
    """A ragged batch of MRPC lengths of which every sequence keeps `kept` of its tokens."""

    kept: float
    dtype_name: str

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.dtype = DTYPES[self.dtype_name]
        full = torch.tensor(known_lengths()["mrpc"][:BATCH])
        self.rows = int(full.sum())
        self.lengths = (full * self.kept).round().long().clamp(min=1)
        self.cu_seqlens = torch.cat([torch.zeros(1), self.lengths.cumsum(0)]).int()
        self.tokens = int(self.cu_seqlens[-1])
        starts = full.cumsum(0) - full
        self.slots = torch.cat([s + torch.arange(n) for s, n in zip(starts, self.lengths, strict=True)]).int()
        self.hidden = self.normal(self.rows, WIDTH)
        self.x = self.normal(self.tokens, WIDTH)
        self.weight = self.normal(WIDTH, WIDTH) * 0.02
        self.norm = torch.ones(WIDTH, dtype=self.dtype), torch.zeros(WIDTH, dtype=self.dtype)
        self.kernels = kernel_set("cpu", "cpu", self.dtype)
        self.packed = self.kernels.pack_weight(self.weight)
        self.packs = can_pack(self.dtype)
        self.weight_of_others = pack_weight(self.weight, "onednn") if self.packs else self.weight

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.dtype)

    def product(self, x: Tensor, bias: Tensor) -> Tensor:
        """By the best product that plain PyTorch has."""
        if self.packs:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight_of_others, bias, "none", [], "")
        return F.linear(x, self.weight_of_others, bias)


Pair = tuple[Callable[[], Any], Callable[[], Any]]


def attention(c: Case) -> Pair:
    qkv = c.normal(c.tokens, 3, HEADS, WIDTH // HEADS)
    q, k, v = qkv.unbind(1)
    longest, lengths = int(c.lengths.max()), c.lengths.tolist()

    def ours() -> Any:
        return c.kernels.ragged_attention(
            q, k, v, c.cu_seqlens, c.cu_seqlens, longest, longest, (WIDTH // HEADS) ** -0.5, None, False
        )[0]

    def plain() -> Tensor:
        parts = []
        for part in qkv.split(lengths):
            heads = (x.transpose(0, 1).unsqueeze(0) for x in part.unbind(1))  # [1, H, n, D]
            parts.append(F.scaled_dot_product_attention(*heads).squeeze(0).transpose(0, 1))
        return torch.cat(parts)

    return ours, plain


def scatter(c: Case) -> Pair:
    index = c.slots.long()
    return (
        lambda: c.kernels.scatter_rows(c.x, c.slots, c.cu_seqlens, c.rows),
        lambda: c.x.new_zeros(c.rows, WIDTH).index_copy_(0, index, c.x),
    )


def compact(c: Case) -> Pair:
    keep = torch.rand(c.tokens) < 0.8
    sequence = torch.repeat_interleave(torch.arange(BATCH), c.lengths)

    def plain() -> tuple[Tensor, Tensor]:
        counts = torch.zeros(BATCH + 1, dtype=torch.int64).index_add_(0, sequence + 1, keep.long())
        return c.slots[keep], counts.cumsum(0, dtype=torch.int32)

    return lambda: c.kernels.compact(keep, c.slots, c.cu_seqlens, False), plain


def linear_norm(c: Case) -> Pair:
    """The end of a layer: product, residual, LayerNorm, scatter. Both sides multiply packed weights."""
    index = c.slots.long()
    bias = c.normal(WIDTH)

    def plain() -> Tensor:
        y = c.product(c.x, bias)
        return c.hidden.index_copy_(0, index, F.layer_norm(y + c.x, (WIDTH,), *c.norm, 1e-12))

    def ours() -> None:
        c.kernels.ragged_linear_norm_(c.hidden, c.slots, c.x, c.packed, bias, c.x, *c.norm, 1e-12, c.cu_seqlens)

    return ours, plain


def skim_logit(c: Case) -> Pair:
    bias, out, out_bias = c.normal(WIDTH), c.normal(WIDTH), c.normal(1)

    def plain() -> Tensor:
        x = F.layer_norm(c.hidden.index_select(0, c.slots), (WIDTH,), *c.norm, 1e-5)
        return F.gelu(F.layer_norm(c.product(x, bias), (WIDTH,), *c.norm, 1e-5)) @ out + out_bias

    def ours() -> Tensor:
        return c.kernels.skim_logit(
            c.hidden, c.slots, c.cu_seqlens, *c.norm, c.packed, bias, *c.norm, out, out_bias, 1e-5
        )

    return ours, plain


def skim_tokens(c: Case) -> Pair:
    """Against our own single operators: whether one call for both steps pays."""
    predictor = (*c.norm, c.packed, c.normal(WIDTH), *c.norm, c.normal(WIDTH), c.normal(1), 1e-5)
    listed = (c.hidden, c.slots, c.cu_seqlens)

    def parts() -> tuple[Tensor, Tensor]:
        return c.kernels.compact(~(c.kernels.skim_logit(*listed, *predictor) < 0.0), c.slots, c.cu_seqlens, True)

    return lambda: c.kernels.skim_tokens(*listed, *predictor, 0.0, True), parts


def encoder_layer(c: Case) -> Pair:
    """Against our own single operators, as `compose_layer_` strings them together."""
    sizes = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "ffn_in": (FFN, WIDTH), "ffn_out": (WIDTH, FFN)}
    matrices = {
        name: (c.kernels.pack_weight(c.normal(*size) * 0.02), c.normal(size[0])) for name, size in sizes.items()
    }
    qkv, out, ffn_in, ffn_out = matrices.values()
    layer: tuple[Any, ...] = (*qkv, None, None, *out, *c.norm, 1e-12, *ffn_in, *ffn_out, *c.norm, 1e-12, "gelu")
    state = (c.hidden, c.slots, c.cu_seqlens, int(c.lengths.max()), HEADS)
    return lambda: c.kernels.encoder_layer_(*state, *layer), lambda: compose_layer_(c.kernels, *state, *layer)


OPERATORS: dict[str, Callable[[Case], Pair]] = {
    "ragged_attention": attention,
    "scatter_rows": scatter,
    "compact": compact,
    "ragged_linear_norm_": linear_norm,
    "skim_logit": skim_logit,
    "skim_tokens": skim_tokens,
    "encoder_layer_": encoder_layer,
}


def check(case: Case, name: str, runs: Pair) -> None:
    """Raises ValueError where the two sides differ by more than the dtype's error; `case` stays as it is."""
    before, found = case.hidden.clone(), []
    for run in runs:
        found.append([x.clone() for x in _compared(run(), case)])
        case.hidden.copy_(before)
    for ours, plain in zip(*found, strict=True):
        if ours.shape != plain.shape:
            raise ValueError(f"{name}: shapes differ, {tuple(ours.shape)} and {tuple(plain.shape)}")
        apart = float((ours.double() - plain.double()).abs().max() / plain.double().abs().max())
        exact = not ours.is_floating_point()
        if not apart <= (0.0 if exact else TOLERANCES[case.dtype_name]):
            raise ValueError(f"{name}: results differ by {apart:.1e} of the largest")


def _compared(found: Any, case: Case) -> list[Tensor]:
    """What a run returned, or else changed; lists of tokens without what lies beyond their end."""
    if isinstance(found, tuple):
        slots, cu_seqlens = found
        return [slots[: int(cu_seqlens[-1])], cu_seqlens]
    return [case.hidden if found is None else found]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    flush = torch.zeros(CACHE_BYTES // 4)
    rows = []
    for kept in KEPT:
        case = Case(kept, arguments.dtype)
        for name, make in OPERATORS.items():
            row: dict[str, Any] = {"name": name, "dtype": arguments.dtype, "tokens": case.tokens}
            for state, between in (("hot", None), ("cold", flush.sum)):
                runs = make(case)
                check(case, name, runs)
                field = dict(zip(("ours", "plain"), runs, strict=True))
                ours, plain = median_seconds(field, arguments.repeats, 3, between).values()  # three rounds compile
                row[state] = {"ours_us": round(ours * 1e6, 1), "plain_us": round(plain * 1e6, 1)}
                row[state]["ratio"] = round(plain / ours, 2)
            rows.append(row)
            print(row)
    write(arguments.json, "Native CPU operators against the same without them", rows)


if __name__ == "__main__":
    main()
