"""Weights in every form that the CPU kernels multiply with, and that a packed one is never taken for a matrix."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import transkimmer_kernels as tk
from transkimmer_kernels import cpu_products, kernel_set
from transkimmer_kernels.cpu_products import FORMS, pack_weight

from ..clock import Clock
from ..target import DTYPES, Target
from . import oracle
from .closeness import FORWARD, assert_close_as_torch
from .operators import CASES, clone

CPU = Target("cpu", "cpu")
SHAPES = ((1, 1), (3, 40), (33, 17), (100, 263), (2304, 768), (768, 3072))  # [out, in]
ROWS = (0, 1, 5, 50, 97)


@pytest.fixture(autouse=True)
def _native() -> None:
    CPU.require("ragged_linear")


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, count: int | None = None, activation: str = "none"
) -> Tensor:
    cu_seqlens = torch.tensor([0, x.size(0) if count is None else count], dtype=torch.int32)
    return kernel_set("cpu", "cpu", x.dtype).ragged_linear(x, weight, bias, cu_seqlens, None, activation)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES["cpu"], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form_is_as_close_as_torch(form: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """With a bias and GELU, and without; the rows behind the count are NaN."""
    if not cpu_products._offers(form, dtype):
        pytest.skip(f"no {form} for {dtype} on this machine")
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    packed = pack_weight(weight, form)
    assert packed.shape[:2] == weight.shape
    inputs = [torch.randn(rows, shape[1]).to(dtype) for rows in ROWS]
    x = torch.cat(inputs)  # compared as a whole: of a single number PyTorch's rounding may be lucky
    for b, activation in ((bias, "gelu"), (None, "none")):
        actual = []
        for part in inputs:
            padded = torch.cat([part, torch.full((3, shape[1]), torch.nan, dtype=dtype)])
            actual.append(multiply(padded, packed, b, len(part), activation)[: len(part)])
        truth, torchs = (_oracle(x, weight, b, activation, d) for d in (torch.float64, dtype))
        # oneDNN adds a row up in one go, which rounds more in fp32 than MKL's partial sums.
        factor = 4 if form == "onednn" and dtype == torch.float32 else FORWARD
        assert_close_as_torch(torch.cat(actual), truth, torchs, factor)


def _oracle(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return F.gelu(y) if activation == "gelu" else y


@pytest.mark.parametrize("dtype", DTYPES["cpu"], ids=str)
def test_a_row_keeps_its_bits(dtype: torch.dtype) -> None:
    """Whatever its batch mates are, and however many."""
    x, weight = torch.randn(50, 300).to(dtype), pack_weight(torch.randn(70, 300).to(dtype), "panels")
    y = multiply(x, weight, activation="gelu")
    for rows in ([3], [7, 3], [*range(20), *range(20), 3]):
        assert torch.equal(multiply(x[rows], weight, activation="gelu")[-1], y[3])
    x[:3] = torch.nan
    assert torch.equal(multiply(x, weight, activation="gelu")[3:], y[3:])


def test_panels_are_never_taken_for_a_matrix() -> None:
    weight, x = torch.randn(40, 24), torch.randn(5, 24)
    packed = pack_weight(weight, "panels")
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(RuntimeError):
        kernel_set("reference", "cpu").ragged_linear(x, packed, None, cu_seqlens, None, "none")
    with pytest.raises(RuntimeError):
        F.linear(x, packed)
    for copied in (packed.clone(), packed.contiguous(), packed[:16], packed[:, :8], weight[:, :, None].contiguous()):
        with pytest.raises(RuntimeError, match="packed"):
            multiply(x, copied)
    y = multiply(x, packed)
    assert torch.equal(multiply(x, copy.deepcopy(packed)), y)
    torch.testing.assert_close(y, F.linear(x, weight))


def test_panels_of_another_instruction_set_are_refused() -> None:
    columns = 2 * pack_weight(torch.ones(1, 1), "panels").size(2)
    foreign = torch.zeros(columns * 24).as_strided((columns, 24, columns), (1, columns, 0))
    with pytest.raises(RuntimeError, match=f"panels of {columns} columns, for another instruction set"):
        multiply(torch.randn(5, 24), foreign)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_whose_rows_are_paired_otherwise_are_refused(dtype: torch.dtype) -> None:
    """AVX-512 with bf16 arithmetic and without it have panels of as many columns."""
    packed = pack_weight(torch.randn(40, 24).to(dtype), "panels")
    columns = packed.stride(1)
    other = packed.as_strided((40, 24, 2 * columns + 1 - packed.size(2)), packed.stride())
    with pytest.raises(
        RuntimeError, match=r"paired rows.*another instruction set|another instruction set.*paired rows"
    ):
        multiply(torch.randn(5, 24).to(dtype), other)


def test_what_cannot_be_packed() -> None:
    assert pack_weight(torch.empty(0, 5)).shape == (0, 5)
    with pytest.raises(RuntimeError, match="must not be empty"):
        torch.ops.transkimmer_cpu.pack_panels(torch.empty(0, 5))
    with pytest.raises(RuntimeError, match="float32 and bfloat16"):
        torch.ops.transkimmer_cpu.pack_panels(torch.ones(2, 2, dtype=torch.float64))
    half = torch.ones(2, 2, dtype=torch.float16)
    assert pack_weight(half) is half


def test_choice_of_form(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = cpu_products.choose_form.__wrapped__
    monkeypatch.delenv("TRANSKIMMER_CPU_PRODUCTS", raising=False)
    assert choose(torch.float64) == "plain"
    for form in FORMS:
        monkeypatch.setenv("TRANSKIMMER_CPU_PRODUCTS", form)
        if cpu_products._offers(form, torch.float32):
            assert choose(torch.float32) == form
        monkeypatch.setattr(cpu_products, "_offers", lambda offered, dtype: offered == "plain")
        if form != "plain":
            message = rf"^TRANSKIMMER_CPU_PRODUCTS='{form}': not for torch.float32 on this machine; there is plain$"
            with pytest.raises(ValueError, match=message):
                choose(torch.float32)
        monkeypatch.undo()
    monkeypatch.setenv("TRANSKIMMER_CPU_PRODUCTS", "best")
    with pytest.raises(ValueError, match=r"^TRANSKIMMER_CPU_PRODUCTS='best': must be one of panels, onednn, plain"):
        choose(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forms_are_timed_where_none_was_measured(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    choose = cpu_products.choose_form.__wrapped__
    monkeypatch.delenv("TRANSKIMMER_CPU_PRODUCTS", raising=False)
    offered = [form for form in FORMS if cpu_products._offers(form, dtype)]
    sleepy = set(offered)

    def products(dtype: torch.dtype, form: str) -> Callable[[], None]:
        return lambda: clock.sleep(0.02 if form in sleepy else 0.001)

    monkeypatch.setattr(cpu_products, "_MEASURED", {})
    with monkeypatch.context() as timed:
        clock = Clock(timed)
        timed.setattr(cpu_products, "_products", products)
        for fastest in offered:
            sleepy = set(offered) - {fastest}
            assert choose(dtype) == fastest
    assert choose(dtype) in offered  # real products
    monkeypatch.setattr(cpu_products, "_MEASURED", {(cpu_products.instruction_set(), dtype): ("plain",)})
    monkeypatch.setattr(cpu_products, "faster_form", None)  # is not asked
    assert choose(dtype) == "plain"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["ragged_linear", "ragged_linear_norm", "skim_logit", "skim_tokens", "encoder_layer_"])
@torch.no_grad()
def test_the_public_operators_take_packed_weights(name: str, form: str) -> None:
    if not cpu_products._offers(form, torch.float32):
        pytest.skip(f"no {form} on this machine")
    known = "skim_logit" if name == "skim_tokens" else name
    kwargs = next(case for case in CASES if case.operator == known and case.lengths != "empty").make(torch.float32)
    matrices = [key for key, x in kwargs.items() if key.endswith("weight") and x is not None and x.dim() == 2]
    packed = kwargs | {key: pack_weight(kwargs[key], form) for key in matrices}
    assert matrices
    function = getattr(tk, name)
    in_form, as_they_are = (function(**clone(given), kernels="cpu") for given in (packed, kwargs))
    if name == "skim_tokens":
        assert torch.equal(in_form[1], as_they_are[1])
        return
    for ours, expected in zip(*(oracle.valid(name, kwargs, out) for out in (in_form, as_they_are)), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_view_is_packed_by_value(form: str) -> None:
    if not cpu_products._offers(form, torch.float32):
        pytest.skip(f"no {form} on this machine")
    weight, x = torch.randn(24, 16).T, torch.randn(5, 24)
    torch.testing.assert_close(multiply(x, pack_weight(weight, form)), F.linear(x, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "plain"])
def test_packed_weights_are_not_differentiable(form: str) -> None:
    if not cpu_products._offers(form, torch.float32):
        pytest.skip(f"no {form} on this machine")
    x, packed, cu_seqlens = torch.randn(3, 40), pack_weight(torch.randn(8, 40), form), torch.tensor([0, 3]).int()
    tk.ragged_linear(x, packed, None, cu_seqlens, kernels="cpu")
    with pytest.raises(RuntimeError, match="weight, packed: not differentiable; pass the matrix"):
        tk.ragged_linear(x.requires_grad_(), packed, None, cu_seqlens, kernels="cpu")


def test_packed_weights_of_another_shape_or_for_other_kernels_are_refused() -> None:
    x, cu_seqlens = torch.randn(3, 40), torch.tensor([0, 3], dtype=torch.int32)
    packed = pack_weight(torch.randn(8, 40), "panels")
    with pytest.raises(ValueError, match=r"weight: expected shape \[\*, 40\], got"):
        tk.ragged_linear(x, packed, None, cu_seqlens, kernels="reference")
    with pytest.raises(ValueError, match=r"weight: expected shape \[\*, 41, \*\], got"):
        tk.ragged_linear(torch.randn(3, 41), packed, None, cu_seqlens, kernels="cpu")
