"""The CUDA kernels on the conformance cases, without a GPU: compiled for the host and stepped through.

`csrc/tests/emulated` holds them with every CUDA thread a fiber; `make test` builds it. What stands between these
kernels and the operators on a device is their registration, and the choice that tests/kernels/test_cuda_choice.py
covers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transkimmer_kernels.ops.ragged_attention.cuda import is_short
from transkimmer_kernels.ops.skim_logit.cuda import fits

from ..target import EMULATION, skip
from . import cases, oracle
from .cases import Kwargs, Source
from .closeness import assert_close_as_torch
from .operators import CASES, PREDICTOR, SPECS

LIBRARY = Path(__file__).parents[2] / "build/cmake/libemulated_kernels.so"
HALVES = (torch.float16, torch.bfloat16)


def _arguments(text: str) -> type[ctypes.Structure]:
    """A structure of csrc/include/transkimmer from "kind name name ..., kind name ..."; p: pointer, q: int64."""
    kinds = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float, "?": ctypes.c_bool}
    groups = [group.split() for group in text.split(",")]
    members = [(name, kinds[kind]) for kind, *names in groups for name in names]
    return type("Arguments", (ctypes.Structure,), {"_fields_": members})


Compact = _arguments("p keep slots cu_seqlens new_slots new_cu_seqlens workspace, q capacity batch, ? keep_first")
MoveRows = _arguments("p source target slots cu_seqlens, q capacity batch row_bytes target_rows")
Attention = _arguments(
    "p q, q q_row q_head, p k, q k_row k_head, p v, q v_row v_head, "
    "p cu_seqlens_q cu_seqlens_k keep out lse importance_by_head importance, "
    "q capacity_q capacity_k batch max_seqlen_k, i heads head_dim, f scale"
)
SkimLogit = _arguments(
    f"p hidden slots cu_seqlens {' '.join(PREDICTOR)} logit keep, q capacity batch, i width inner, f eps threshold"
)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if not LIBRARY.is_file():
        skip(EMULATION, "csrc/tests/emulated is not built; make test does that")
    return ctypes.CDLL(str(LIBRARY))


def _run(function: Callable[..., int], structure: type[ctypes.Structure], *extra: int, **values: Any) -> None:
    """Calls a kernel; tensors are passed by their address, None and empty ones as a null pointer."""
    plain = {name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in values.items()}
    assert {name for name, _ in structure._fields_} == set(plain)  # type: ignore[misc]
    assert function(ctypes.byref(structure(**plain)), *extra) == 0


def _is_bf16(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def _cases(operator: str, dtype: torch.dtype) -> Iterator[tuple[str, Kwargs]]:
    for case in CASES:
        if case.operator == operator and case.backends is None:
            yield str(case), case.make(dtype)


def short_attention(library: ctypes.CDLL, kwargs: Kwargs) -> tuple[Tensor, Tensor, Tensor]:
    """What csrc/library_cuda_attention.cpp does; fresh memory is NaN."""
    q, k, v = (kwargs[name] for name in "qkv")
    heads, head_dim = q.shape[1:]
    scale = head_dim**-0.5 if kwargs["scale"] is None else kwargs["scale"]
    counted = k.size(0) if kwargs["return_importance"] else 0
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    lse = torch.full((heads, q.size(0)), torch.nan)
    by_head, importance = torch.full((heads, counted), torch.nan), torch.full((counted,), torch.nan)
    views = {}
    for name, x in (("q", q), ("k", k), ("v", v)):
        views |= {name: x, f"{name}_row": x.stride(0), f"{name}_head": x.stride(1)}
    _run(
        library.emulated_short_attention,
        Attention,
        _is_bf16(q),
        **views,
        cu_seqlens_q=kwargs["cu_seqlens_q"],
        cu_seqlens_k=kwargs["cu_seqlens_k"],
        keep=kwargs["keep"],
        out=out,
        lse=lse,
        importance_by_head=by_head if counted else None,
        importance=importance if counted else None,
        capacity_q=q.size(0),
        capacity_k=k.size(0),
        batch=kwargs["cu_seqlens_k"].numel() - 1,
        max_seqlen_k=kwargs["max_seqlen_k"],
        heads=heads,
        head_dim=head_dim,
        scale=scale,
    )
    return out, lse, importance


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_attention(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    spec, served = SPECS["ragged_attention"], 0
    for name, kwargs in _cases("ragged_attention", dtype):
        if not is_short(*(kwargs[x] for x in ("q", "k", "v", "max_seqlen_q", "max_seqlen_k"))):
            continue
        served += 1
        actual = oracle.valid("ragged_attention", kwargs, short_attention(library, kwargs))
        truth, yardstick = spec.oracle(kwargs, torch.float64), spec.oracle(kwargs, dtype)
        terms = spec.terms(kwargs, actual[0])
        for output, ours, exact, plain in zip(spec.outputs, actual, truth, yardstick, strict=True):
            assert_close_as_torch(ours, exact, plain, name=f"{name}: {output}", terms=terms.get(output))
    assert served >= 24


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("foreign", [torch.nan, torch.inf])
def test_neighbours_do_not_matter_bit_for_bit(library: ctypes.CDLL, dtype: torch.dtype, foreign: float) -> None:
    kwargs = cases.ragged_attention(Source(dtype), (9, 1, 0, 20, 7, 40, 3), head_dim=64, importance=True)
    expected, own = short_attention(library, kwargs), slice(10, 30)
    for name in ("q", "k", "v"):
        x = kwargs[name].clone()
        x[: own.start], x[own.stop :] = foreign, foreign
        out, lse, importance = short_attention(library, {**kwargs, name: x})
        assert torch.equal(out[own], expected[0][own])
        assert torch.equal(lse[:, own], expected[1][:, own])
        assert torch.equal(importance[own], expected[2][own])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_skim_logit(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    spec, served = SPECS["skim_logit"], 0
    for name, kwargs in _cases("skim_logit", dtype):
        if not fits(kwargs["hidden"], tuple(kwargs[weight] for weight in PREDICTOR)):
            continue
        served += 1
        logit = torch.full((kwargs["slots"].numel(),), torch.nan)
        _run(
            library.emulated_skim_logit,
            SkimLogit,
            _is_bf16(kwargs["hidden"]),
            **kwargs,
            logit=logit,
            keep=None,
            capacity=logit.numel(),
            batch=kwargs["cu_seqlens"].numel() - 1,
            width=kwargs["hidden"].size(1),
            inner=kwargs["fc_bias"].numel(),
            eps=1e-5,
            threshold=0.0,
        )
        (ours,) = oracle.valid("skim_logit", kwargs, logit)
        (truth,), (plain,) = spec.oracle(kwargs, torch.float64), spec.oracle(kwargs, dtype)
        assert_close_as_torch(ours, truth, plain, name=name)
    assert served == 2


@pytest.mark.parametrize("operator", ["gather_rows", "scatter_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool], ids=str)
def test_rows(library: ctypes.CDLL, operator: str, dtype: torch.dtype) -> None:
    for name, kwargs in _cases(operator, torch.float32):
        x = kwargs["x"].to(dtype)
        rows = kwargs["slots"].numel() if operator == "gather_rows" else kwargs["num_rows"]
        target = torch.ones((rows, *x.shape[1:]), dtype=dtype)
        _run(
            library.emulated_move_rows,
            MoveRows,
            int(operator == "scatter_rows"),
            source=x,
            target=target,
            slots=kwargs["slots"],
            cu_seqlens=kwargs["cu_seqlens"],
            capacity=kwargs["slots"].numel(),
            batch=kwargs["cu_seqlens"].numel() - 1,
            row_bytes=x[:1].numel() * x.element_size() if x.size(0) else 0,
            target_rows=rows,
        )
        (ours,) = oracle.valid(operator, kwargs, target)
        (wanted,) = getattr(oracle, operator)(**{**kwargs, "x": x})
        assert torch.equal(ours, wanted), name


def test_compact(library: ctypes.CDLL) -> None:
    for name, kwargs in _cases("compact", torch.float32):
        slots, cu_seqlens = torch.full_like(kwargs["slots"], -1), torch.full_like(kwargs["cu_seqlens"], -1)
        _run(
            library.emulated_compact,
            Compact,
            **kwargs,
            new_slots=slots,
            new_cu_seqlens=cu_seqlens,
            workspace=None,
            capacity=slots.numel(),
            batch=cu_seqlens.numel() - 1,
        )
        for ours, wanted in zip(
            oracle.valid("compact", kwargs, (slots, cu_seqlens)), oracle.compact(**kwargs), strict=True
        ):
            assert torch.equal(ours, wanted), name
