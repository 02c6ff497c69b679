"""The table of the conformance suite: each operator's public function, oracle, leaves and awkward cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import transkimmer_kernels as tk

from . import cases, oracle
from .cases import LENGTHS, Case, Kwargs

PREDICTOR = (
    "norm1_weight",
    "norm1_bias",
    "fc_weight",
    "fc_bias",
    "norm2_weight",
    "norm2_bias",
    "out_weight",
    "out_bias",
)


@dataclass(frozen=True)
class Spec:
    function: Callable[..., Any]
    leaves: tuple[str, ...] = ()  # differentiable arguments; gradients flow through the first output
    backward: tuple[str, ...] = ()  # operators of ours that its backward runs
    exact: bool = False  # moves values without arithmetic
    outputs: tuple[str, ...] = ("out",)

    @property
    def name(self) -> str:
        return self.function.__name__

    def oracle(self, kwargs: Kwargs, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The valid part of the outputs, by the plain formula in `dtype`."""
        with single_thread():
            return getattr(oracle, self.name)(**cast(kwargs, dtype))

    def oracle_gradients(self, kwargs: Kwargs, upstream: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Gradients of the first output's valid part by autograd through the plain formula in `dtype`."""
        copy = cast({name: x.detach() if isinstance(x, Tensor) else x for name, x in kwargs.items()}, dtype)
        leaves = {name: copy[name].requires_grad_() for name in self.present_leaves(kwargs)}
        with single_thread():
            first = getattr(oracle, self.name)(**copy)[0]
            grads = torch.autograd.grad(first, tuple(leaves.values()), upstream.to(dtype), materialize_grads=True)
        return dict(zip(leaves, grads, strict=True))

    def terms(self, kwargs: Kwargs, upstream: Tensor) -> dict[str, Tensor]:
        """`terms` of `assert_close_as_torch` for leaves and outputs, by name, where cancellation asks for them."""
        if self.name != "ragged_attention":
            return {}
        with torch.no_grad(), single_thread():
            return oracle.attention_terms(upstream.double(), **cast(kwargs, torch.float64))

    def present_leaves(self, kwargs: Kwargs) -> list[str]:
        return [name for name in self.leaves if kwargs[name] is not None]


SPECS = {
    spec.name: spec
    for spec in (
        Spec(tk.compact, exact=True, outputs=("slots", "cu_seqlens")),
        Spec(tk.gather_rows, ("x",), ("scatter_rows",), exact=True),
        Spec(tk.scatter_rows, ("x",), ("gather_rows",), exact=True),
        Spec(tk.skim_logit, ("hidden", *PREDICTOR)),
        Spec(
            tk.ragged_attention,
            ("q", "k", "v", "keep"),
            ("ragged_attention_backward",),
            outputs=("out", "lse", "importance"),
        ),
        Spec(tk.ragged_linear, ("x", "weight", "bias")),
        Spec(tk.ragged_linear_norm, ("x", "weight", "bias", "residual", "norm_weight", "norm_bias")),
        Spec(tk.ragged_linear_norm_),
        Spec(tk.skim_tokens, outputs=("slots", "cu_seqlens")),
        Spec(tk.encoder_layer_),
        Spec(tk.embed_tokens),
        Spec(tk.add_norm, ("x", "residual", "weight", "bias"), ("add_norm_backward",)),
        Spec(tk.choose_rows, ("keep", "hidden", "final"), ("choose_rows_backward",)),
    )
}


@contextmanager
def single_thread() -> Iterator[None]:
    """For many small products, which are slower on two threads that others use too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cast(kwargs: Kwargs, dtype: torch.dtype) -> Kwargs:
    """The same arguments with every floating-point tensor in `dtype`."""
    floating = {name for name, x in kwargs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return {name: x.to(dtype) if name in floating else x for name, x in kwargs.items()}


def clone(kwargs: Kwargs) -> Kwargs:
    """Arguments whose tensors may be written; strides are kept."""
    return {name: x.clone() if name == "hidden" else x for name, x in kwargs.items()}


def _over(build: Callable[..., Kwargs], lengths: tuple[str, ...], **options: Any) -> list[Case]:
    return [Case(build, name, options) for name in lengths]


ALL = tuple(LENGTHS)
MOST = ("empty-batch", "no-tokens", "tiny", "awkward")

CASES: list[Case] = [
    *_over(cases.compact, ALL, probability=0.5, keep_first=True),
    *_over(cases.compact, ("tiny", "awkward", "long"), probability=0.5, keep_first=False),
    *_over(cases.compact, ("tiny", "awkward"), probability=0.0, keep_first=True),
    *_over(cases.compact, ("tiny", "awkward"), probability=0.0, keep_first=False),
    *_over(cases.compact, ("awkward", "past-a-tile"), probability=1.0, keep_first=True),
    *_over(cases.gather_rows, MOST, shape=(33,)),
    *_over(cases.gather_rows, ("tiny", "long"), shape=(3, 2, 64)),
    *_over(cases.gather_rows, ("awkward",), shape=()),
    *_over(cases.scatter_rows, MOST, shape=(33,)),
    *_over(cases.scatter_rows, ("tiny", "long"), shape=(3, 2, 64)),
    *_over(cases.scatter_rows, ("awkward",), shape=()),
    *_over(cases.skim_logit, ALL, width=64, inner=32),
    *_over(cases.skim_logit, ("awkward",), width=384, inner=192),
    *_over(cases.skim_logit, ("awkward",), width=768, inner=192),
    *_over(cases.skim_logit, ("awkward",), width=768, inner=768),
    *_over(cases.ragged_attention, ALL, importance=True),
    *_over(cases.ragged_attention, ALL, keep="mixed"),
    *_over(cases.ragged_attention, MOST, head_dim=64, heads=3, layout="heads-first"),
    *_over(cases.ragged_attention, ("awkward",), head_dim=64, heads=6),  # d = 384
    *_over(cases.ragged_attention, ("awkward",), head_dim=64, heads=12, importance=True),  # d = 768
    *_over(cases.ragged_attention, ("tiny", "long"), head_dim=128, heads=1, keep="mixed", importance=True),
    *_over(cases.ragged_attention, ("awkward", "past-a-tile"), keep="first", importance=True, layout="dense"),
    *_over(cases.ragged_attention, ("awkward",), keep="ones", spare=0),
    *_over(cases.ragged_attention, ("awkward", "long"), scale=3.0),  # rows of P that are nearly one-hot
    *_over(cases.ragged_attention, ("tiny", "many-short"), head_dim=64, layout="dense", spare=0, importance=True),
    # First-token queries, queries without a key (a sequence whose keys are all gone) and keys without a query.
    Case(cases.ragged_attention, "one-token", {"key_lengths": (300,), "importance": True}),
    Case(cases.ragged_attention, "tiny", {"key_lengths": (17, 0, 65, 1, 130, 0), "keep": "mixed"}),
    Case(cases.ragged_attention, "tiny", {"key_lengths": (5, 3, 0, 1, 0, 2), "importance": True}),
    Case(cases.ragged_attention, "awkward", {"key_lengths": (65, 1, 9, 130, 40), "head_dim": 64}),
    *(
        Case(cases.ragged_attention, "awkward", {"head_dim": head_dim, "keep": keep}, ("reference", "cpu"))
        for head_dim in (12, 33, 40)
        for keep in (None, "mixed")
    ),
    Case(cases.ragged_attention, "awkward", {"head_dim": 26}),
    # The sequence with the most keys needs less working memory than a tile of queries over fewer.
    Case(
        cases.ragged_attention, "tiny", {"key_lengths": (600, 0, 512, 1, 512, 3), "head_dim": 96}, ("reference", "cpu")
    ),
    *_over(cases.ragged_linear, ALL, width=64, out=96, activation="gelu"),
    *_over(cases.ragged_linear, MOST, width=32, out=40, gather=False),
    *_over(cases.ragged_linear, ("awkward",), width=384, out=1152, bias=False),
    *_over(cases.ragged_linear, ("awkward",), width=768, out=768, gather=False, activation="gelu"),
    *_over(cases.ragged_linear_norm, ALL, width=96, out=64),
    *_over(cases.ragged_linear_norm, MOST, width=32, out=40, gather=False, bias=False),
    *_over(cases.ragged_linear_norm, ("awkward",), width=384, out=384),
    *_over(cases.ragged_linear_norm, ("awkward",), width=768, out=768),
    *_over(cases.ragged_linear_norm_, ALL, width=96, out=64),
    *_over(cases.ragged_linear_norm_, ("awkward",), width=384, out=384, bias=False),
    *_over(cases.ragged_linear_norm_, ("awkward",), width=768, out=768),
    *_over(cases.encoder_layer_, ALL, width=64, heads=2, ff=96),
    *_over(cases.encoder_layer_, ALL, width=64, heads=2, ff=96, first_only=True),
    *_over(cases.encoder_layer_, ("awkward",), width=64, heads=1, ff=40, bias=False, activation="none"),
    *_over(cases.encoder_layer_, ("tiny",), width=128, heads=4, ff=64, bias=False, first_only=True),
    *_over(cases.encoder_layer_, ("awkward",), width=384, heads=6, ff=1536),
    *_over(cases.encoder_layer_, ("awkward",), width=78, heads=3, ff=50),  # heads of 26
    *_over(cases.embed_tokens, MOST, width=64),
    *_over(cases.embed_tokens, ("tiny", "long"), width=33, positions="all", types="all"),
    *_over(cases.embed_tokens, ("awkward",), width=768, positions=None, types=None),
    *_over(cases.add_norm, ALL, width=96),
    *_over(cases.add_norm, ("tiny", "awkward"), width=33, alone=True),
    *_over(cases.add_norm, ("awkward",), width=768),
    *_over(cases.add_norm, ("tiny",), width=1030),
    *_over(cases.choose_rows, ALL, width=96),
    *_over(cases.choose_rows, ("tiny", "awkward"), width=33),
    *_over(cases.choose_rows, ("tiny",), width=1030),
    *_over(cases.embed_tokens, ("tiny",), width=1030, positions=None, types="unknown", id_dtype=torch.int32),
]
# `skim_tokens` is not among them: where a decision falls within rounding of the threshold, no oracle is right.
