"""Which arguments go to the C++ kernels and which to Triton's: decided on the host, by what needs no device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transkimmer_kernels import library, native
from transkimmer_kernels.library import OPERATORS, Operator
from transkimmer_kernels.ops.ragged_attention import cuda as attention
from transkimmer_kernels.ops.skim_logit import cuda as skim

CSRC = Path(__file__).parents[2] / "csrc"


def _heads(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, rows: int = 5, offset: int = 0) -> list[Tensor]:
    """q, k, v as slices of a projection that begins `offset` elements behind an aligned address."""
    projection = torch.zeros(rows * 3 * 2 * head_dim + offset, dtype=dtype)[offset:]
    return list(projection.view(rows, 3, 2, head_dim).unbind(1))


@pytest.mark.parametrize("dtype", attention.DTYPES)
@pytest.mark.parametrize("head_dim", attention.HEAD_DIMS)
def test_short_sequences_are_taken_as_views(dtype: torch.dtype, head_dim: int) -> None:
    heads = _heads(head_dim, dtype)
    assert not heads[0].is_contiguous()
    for longest in (0, 1, attention.LONGEST):
        assert attention.is_short(*heads, longest, longest)
    assert attention.is_short(*_heads(head_dim, dtype, rows=0), 0, 0)


def test_what_short_attention_leaves() -> None:
    beyond = attention.LONGEST + 1
    assert not attention.is_short(*_heads(), beyond, 1)
    assert not attention.is_short(*_heads(), 1, beyond)
    assert not attention.is_short(*_heads(128), 9, 9)
    assert not attention.is_short(*_heads(dtype=torch.float32), 9, 9)
    assert not attention.is_short(*_heads(offset=1), 9, 9)
    assert not attention.is_short(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in _heads()), 9, 9)
    assert attention.is_short(*_heads(offset=8), 9, 9)


def _predictor(width: int, inner: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, tuple[Tensor, ...]]:
    shapes = [(width,), (width,), (inner, width), (inner,), (inner,), (inner,), (inner,), (1,)]
    return torch.zeros(3, width, dtype=dtype), tuple(torch.zeros(shape, dtype=dtype) for shape in shapes)


@pytest.mark.parametrize(("width", "inner"), [(384, 192), (768, 192), (64, 192), (1024, 192)])
def test_predictors_that_fit(width: int, inner: int) -> None:
    for dtype in skim.DTYPES:
        assert skim.fits(*_predictor(width, inner, dtype))


@pytest.mark.parametrize(("width", "inner"), [(96, 192), (1088, 192), (64, 32), (384, 384), (768, 768)])
def test_predictors_that_do_not(width: int, inner: int) -> None:
    assert not skim.fits(*_predictor(width, inner))


def test_predictors_of_other_forms() -> None:
    assert not skim.fits(*_predictor(384, 192, torch.float32))
    hidden, weights = _predictor(384, 192)
    assert not skim.fits(hidden, (*weights[:2], weights[2].t().contiguous().t(), *weights[3:]))
    assert not skim.fits(torch.zeros(3 * 384 + 1, dtype=torch.float16)[1:].view(3, 384), weights)


def test_limits_are_those_of_the_kernels() -> None:
    plan = (CSRC / "include/transkimmer/attention_plan.h").read_text(encoding="utf-8")
    assert re.search(r"kLongestShortSequence = (\d+)", plan)[1] == str(attention.LONGEST)  # type: ignore[index]
    fits = (CSRC / "include/transkimmer/skim_logit.cuh").read_text(encoding="utf-8")
    assert f"width <= {skim.WIDEST} && width % {skim.WIDTH_STEP} == 0" in fits
    assert re.findall(r"inner == (\d+)", fits) == list(map(str, skim.INNER_WIDTHS))


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """A CUDA library that is loaded, with every kernel; what Triton says of itself is to be edited by a test."""
    state: dict[str, str | None] = {"reason": None}
    operator = Operator("skim_logit", "", lambda: None, backends={"triton": lambda: state["reason"]})
    loaded = {"cuda": native.NativeStatus("cuda", Path("libtranskimmer_cuda.so"), True)}
    monkeypatch.setitem(OPERATORS, "skim_logit", operator)
    monkeypatch.setattr(native, "status", lambda: loaded)
    monkeypatch.setattr(native, "why_not", lambda name: None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel", lambda kernel: "skim_logit" in kernel)
    return state


def test_a_choice_needs_both_kernels(triton: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    available = library.needs_kernel("transkimmer_cuda::skim_logit", "skim_logit", "a wide predictor")
    assert available() is None
    triton["reason"] = "triton is not installed"
    assert available() == "a wide predictor needs Triton: triton is not installed"
    del OPERATORS["skim_logit"].backends["triton"]
    assert available() == "a wide predictor needs Triton: no triton kernel for skim_logit"
    missing = library.needs_kernel("transkimmer_cuda::absent", "skim_logit", "a wide predictor")
    assert missing() == "libtranskimmer_cuda.so has no absent: rebuild the package"
    monkeypatch.setattr(native, "why_not", lambda name: "torch sees no CUDA device")
    assert available() == "torch sees no CUDA device"


def test_both_sides_of_a_choice_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for either kernel: each gets the arguments in the order of its schema."""
    calls: list[tuple[str, tuple[Any, ...]]] = []

    class Short:
        @staticmethod
        def short_attention(*args: Any) -> str:
            calls.append(("short", args))
            return "short"

    class General(Operator):
        def overload(self, backend: str) -> Any:
            return lambda *args: calls.append((f"{self.name}.{backend}", args)) or backend

    monkeypatch.setattr(torch.ops, "transkimmer_cuda", Short, raising=False)
    for name in ("ragged_attention", "ragged_attention_backward"):
        monkeypatch.setitem(OPERATORS, name, General(name, "", lambda: None))
    heads, cu = _heads(), torch.tensor([0, 5], dtype=torch.int32)
    assert attention.ragged_attention(*heads, cu, cu, 5, 6, 0.5, None, True) == "short"
    assert attention.ragged_attention(*heads, cu, cu, 5, 500, 0.5, None, True) == "triton"
    assert attention.ragged_attention_backward(*heads, *heads, cu, cu, 5, 6, 0.5, None) == "triton"
    (_, short), (general, args), (backward, _) = calls
    assert short[3:] == (cu, cu, 6, 0.5, None, True)
    assert (general, backward) == ("ragged_attention.triton", "ragged_attention_backward.triton")
    assert args[3:] == (cu, cu, 5, 500, 0.5, None, True)
