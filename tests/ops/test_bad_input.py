"""Bad input to the public functions: an error that names the argument, or a defined result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import transkimmer_kernels as tk
from transkimmer_kernels import BackendUnavailable
from transkimmer_kernels.library import OPERATORS

from ..target import Target
from . import cases, oracle
from .cases import Kwargs, Source
from .operators import SPECS, clone

LENGTHS = (3, 0, 2)
CASES: dict[str, Kwargs] = {
    "compact": {"probability": 0.5, "keep_first": True},
    "gather_rows": {"shape": (8,)},
    "scatter_rows": {"shape": (8,)},
    "skim_logit": {"width": 16, "inner": 8},
    "ragged_attention": {"head_dim": 32, "keep": "mixed"},
    "ragged_linear": {"width": 16, "out": 8},
    "ragged_linear_norm": {"width": 16, "out": 8},
    "ragged_linear_norm_": {"width": 16, "out": 8},
    "skim_tokens": {"width": 16, "inner": 8, "keep_first": True},
    "encoder_layer_": {"width": 16, "heads": 2, "ff": 24},
    "embed_tokens": {"width": 16},
    "add_norm": {"width": 16},
    "choose_rows": {"width": 16},
}
IDS = ("input_ids", "position_ids", "token_type_ids")
LISTS = ("slots", "residual_slots")
OFFSETS = ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k")


def _kwargs(operator: str) -> Kwargs:
    return getattr(cases, operator)(Source(torch.float32), LENGTHS, **CASES[operator])


def _tensors(operator: str) -> list[str]:
    return [name for name, x in _kwargs(operator).items() if isinstance(x, Tensor)]


def _ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# How an argument is broken -> (the broken argument, what the message must say of it).
OFFSET_BREAKS: dict[str, tuple[Tensor, str]] = {
    "starts-late": (_ints(1, 3, 3, 5), "must start at 0, got 1"),
    "decreases": (_ints(0, 4, 3, 5), "must not decrease, got 4 then 3 at entry 2"),
    "negative": (_ints(0, 0, 0, -3), "must not decrease, got 0 then -3 at entry 3"),
    "beyond-capacity": (_ints(0, 3, 3, 1000), "its last entry, 1000 tokens, exceeds the capacity of"),
    "empty": (_ints(), "expected batch \\+ 1 >= 1 entries"),
    "int64": (torch.tensor([0, 3, 3, 5]), "expected dtype torch.int32, got torch.int64"),
    "two-dimensional": (_ints(0, 3, 3, 5)[None], "expected 1 dimensions, got"),
}
SLOT_BREAKS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "negative": (
        lambda slots: slots.index_fill(0, torch.tensor([1]), -1),
        r"must lie in \[0, \d+\), got values from -1",
    ),
    "too-large": (lambda slots: slots.index_fill(0, torch.tensor([4]), 12), r"must lie in \[0, \d+\), got .* to 12"),
    "int64": (lambda slots: slots.long(), "expected dtype torch.int32, got torch.int64"),
    "two-dimensional": (lambda slots: slots[None], "expected (1 dimensions|shape)"),
}


def _refused(target: Target, operator: str, kwargs: Kwargs, message: str) -> None:
    target.require(operator)
    with pytest.raises((ValueError, TypeError), match=message):
        SPECS[operator].function(**kwargs, kernels=target.backend)


def _pairs(names: tuple[str, ...] | None, breaks: Any) -> list[Any]:
    return [
        pytest.param(operator, name, how, id=f"{operator}-{name}-{how}")
        for operator in CASES
        for name in _tensors(operator)
        if names is None or name in names
        for how in breaks
    ]


@pytest.mark.parametrize(("operator", "name", "how"), _pairs(OFFSETS, OFFSET_BREAKS))
def test_bad_offsets(target: Target, operator: str, name: str, how: str) -> None:
    broken, message = OFFSET_BREAKS[how]
    _refused(target, operator, {**_kwargs(operator), name: broken}, f"^{name}: {message}")


@pytest.mark.operators("compact")
def test_one_token_more_than_there_are_rows(target: Target) -> None:
    kwargs = {"keep": torch.ones(5, dtype=torch.bool), "slots": _ints(*range(5)), "cu_seqlens": _ints(0, 3, 5)}
    kept, _ = target.call(tk.compact, **{name: x.to(target.device) for name, x in kwargs.items()}, keep_first=True)
    assert kept.tolist() == [0, 1, 2, 3, 4]
    message = "^cu_seqlens: its last entry, 6 tokens, exceeds the capacity of 5 rows"
    _refused(target, "compact", kwargs | {"cu_seqlens": _ints(0, 3, 6), "keep_first": True}, message)


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("operator", ["ragged_linear_norm", "ragged_linear_norm_"])
def test_a_residual_has_as_many_rows_as_its_product(target: Target, operator: str, change: int) -> None:
    """Kernels would read behind the end of a shorter one."""
    kwargs = _kwargs(operator)
    kwargs |= {"residual_slots": None} if operator == "ragged_linear_norm" else {}
    rows = kwargs["x"].size(0)
    message = f"^residual: expected {rows} rows like x, got {rows + change}"
    _refused(target, operator, kwargs | {"residual": torch.zeros(rows + change, 8)}, message)


@pytest.mark.parametrize(("operator", "name", "how"), _pairs(LISTS, SLOT_BREAKS))
def test_bad_slots(target: Target, operator: str, name: str, how: str) -> None:
    if operator == "compact" and how == "too-large":
        pytest.skip("compact never looks a slot up, so that any row number will do")
    kwargs = _kwargs(operator)
    change, message = SLOT_BREAKS[how]
    _refused(target, operator, {**kwargs, name: change(kwargs[name])}, f"^{name}: {message}")


def _breaks_of(operator: str, name: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to spoil a dense argument that its operator does not take as well."""
    if name in OFFSETS + LISTS:
        return {"device": lambda x: x.to("meta")}
    breaks: dict[str, Callable[[Tensor], Tensor]] = {
        "dtype": lambda x: x.int(),
        "device": lambda x: x.to("meta"),
        "rank": lambda x: x[None],
        "size": lambda x: x[..., :-1],
    }
    if operator in ("gather_rows", "scatter_rows"):
        return {"device": breaks["device"]}  # rows of any shape and dtype
    if name in IDS:
        breaks["dtype"] = lambda x: x.float()
    return breaks


# The sizes of these arguments are what the others are held against.
MEASURES = {
    "ragged_linear": ("x", "weight"),
    "ragged_linear_norm": ("x", "weight"),
    "skim_logit": ("hidden", "fc_bias"),
}
MEASURES |= {"ragged_linear_norm_": ("x", "weight"), "ragged_attention": ("q",)}
MEASURES |= {"embed_tokens": ("input_ids", "word_weight"), "add_norm": ("x", "weight"), "choose_rows": ("hidden",)}
MEASURES |= {"skim_tokens": MEASURES["skim_logit"], "encoder_layer_": ("hidden", "ffn_in_weight")}


@pytest.mark.parametrize(
    ("operator", "name", "how"),
    [
        pytest.param(operator, name, how, id=f"{operator}-{name}-{how}")
        for operator in CASES
        for name in _tensors(operator)
        for how in _breaks_of(operator, name)
    ],
)
def test_bad_tensor(target: Target, operator: str, name: str, how: str) -> None:
    kwargs = _kwargs(operator)
    kwargs[name] = _breaks_of(operator, name)[how](kwargs[name])
    # Two devices or two sizes that disagree: the message may name either argument, but it names one and both values.
    anyone = how == "device" or (how == "size" and name in MEASURES.get(operator, ()))
    said = {"dtype": "expected dtype", "device": "expected device", "rank": "expected", "size": "expected"}[how]
    _refused(target, operator, kwargs, f"^{r'[a-z0-9_]+' if anyone else name}: {said}")


@pytest.mark.parametrize(
    "operator", [name for name in CASES if any(x in LISTS for x in _tensors(name)) and name != "compact"]
)
def test_list_on_another_device(target: Target, operator: str) -> None:
    """Slots and offsets that agree with each other, but not with the rows."""
    kwargs = _kwargs(operator)
    moved = {name: x.to("meta") if name in LISTS + OFFSETS else x for name, x in kwargs.items()}
    _refused(target, operator, moved, "^[a-z_]+: expected device")


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [
        ("scatter_rows", {"num_rows": -1}, "^num_rows: must not be negative, got -1"),
        ("scatter_rows", {"num_rows": 2}, r"^slots: must lie in \[0, 2\)"),
        ("ragged_linear", {"activation": "relu"}, "^activation: must be one of .*, got 'relu'"),
        ("encoder_layer_", {"activation": "relu"}, "^activation: must be one of .*, got 'relu'"),
        ("encoder_layer_", {"num_heads": 3}, "^num_heads: must divide the width of hidden, 16, got 3"),
        ("encoder_layer_", {"num_heads": 0}, "^num_heads: must divide the width of hidden, 16, got 0"),
        ("encoder_layer_", {"max_seqlen": 2}, "^max_seqlen: must be at least the longest sequence, 3, got 2"),
        ("encoder_layer_", {"query_bias": torch.zeros(16)}, "^query_bias: needs query_weight, which is None"),
        ("encoder_layer_", {"query_weight": torch.zeros(16, 16)}, r"^qkv_weight: expected shape \[32, 16\], got"),
        ("add_norm", {"bias": torch.zeros(16).bfloat16()}, "^bias: expected dtype torch.float32, got torch.bfloat16"),
        ("embed_tokens", {"input_ids": torch.tensor([[0, 1, 50]] * 3)}, r"^input_ids: must lie in \[0, 50\), .* to 50"),
        ("embed_tokens", {"position_ids": torch.tensor([[-1, 0, 0]])}, r"^position_ids: must lie in \[0, 6\), .* -1"),
        ("embed_tokens", {"token_type_ids": torch.full((3, 3), 2)}, r"^token_type_ids: must lie in \[0, 2\)"),
        ("embed_tokens", {"position_ids": torch.zeros(2, 3).long()}, "^position_ids: expected 1 or 3 rows, got"),
        ("embed_tokens", {"type_weight": None}, "^token_type_ids: needs type_weight, which is None"),
        ("embed_tokens", {"type_weight": torch.zeros(0, 16)}, "^type_weight: expected at least one type"),
        (
            "embed_tokens",
            {"position_ids": None, "position_weight": torch.zeros(2, 16)},
            "^input_ids: 3 tokens a sequence, but position_weight has 2 positions",
        ),
        ("ragged_attention", {"max_seqlen_q": 2}, "^max_seqlen_q: must be at least the longest sequence, 3, got 2"),
        ("ragged_attention", {"max_seqlen_k": 0}, "^max_seqlen_k: must be at least the longest sequence, 3, got 0"),
        ("ragged_attention", {"cu_seqlens_k": _ints(0, 5)}, "^cu_seqlens_k: expected 4 entries .*, got 2"),
    ],
)
def test_bad_value(target: Target, operator: str, change: Kwargs, message: str) -> None:
    _refused(target, operator, {**_kwargs(operator), **change}, message)


@pytest.mark.parametrize("operator", ["ragged_linear_norm_", "encoder_layer_"])
def test_written_tensor_must_be_contiguous(target: Target, operator: str) -> None:
    kwargs = _kwargs(operator)
    kwargs["hidden"] = kwargs["hidden"].T.contiguous().T
    _refused(target, operator, kwargs, "^hidden: is written in place and must be contiguous")


@pytest.mark.operators("ragged_linear_norm_")
@pytest.mark.parametrize("name", ["x", "residual"])
def test_operand_in_the_memory_that_is_written(target: Target, name: str) -> None:
    """Rows would be read before or after they are written, as it happens; parts that lie apart will do."""
    build = cases.ragged_linear_norm_
    kwargs = build(Source(torch.float32, target.device), LENGTHS, width=8, out=8)
    capacity, rows = kwargs["x"].size(0), kwargs["hidden"].size(0)
    memory = torch.randn((capacity + rows + capacity) * 8, device=target.device)

    def part(begin: int, size: int) -> Tensor:
        return memory[begin : begin + size * 8].view(size, 8)

    hidden, front, behind = part(capacity * 8, rows), 0, (capacity + rows) * 8
    listed = kwargs["slots"][:5].long()
    for begin in (front + 1, capacity * 8, behind - 1):
        with pytest.raises(ValueError, match=f"^{name}: shares memory with hidden, which is written"):
            tk.ragged_linear_norm_(**{**kwargs, "hidden": hidden, name: part(begin, capacity)}, kernels=target.backend)
    for begin in (front, behind):
        kwargs[name] = part(begin, capacity)
        expected = target.call(tk.ragged_linear_norm_, **{**kwargs, "hidden": hidden.clone()})
        before = hidden.clone()
        found = target.call(tk.ragged_linear_norm_, **{**kwargs, "hidden": hidden})
        assert torch.equal(found[listed], expected[listed])
        hidden.copy_(before)


@pytest.mark.parametrize("operator", [name for name in CASES if any(x in LISTS + OFFSETS for x in _tensors(name))])
def test_lists_may_be_views_with_strides(target: Target, operator: str) -> None:
    target.require(operator)
    function = SPECS[operator].function
    kwargs = getattr(cases, operator)(Source(torch.float32, target.device), LENGTHS, **CASES[operator])
    views = {name: torch.stack([x, x + 9], 1)[:, 0] for name, x in kwargs.items() if name in LISTS + OFFSETS}
    assert views and not any(x.is_contiguous() for x in views.values())
    expected = oracle.valid(operator, kwargs, target.call(function, **clone(kwargs)))
    actual = oracle.valid(operator, kwargs, target.call(function, **clone(kwargs | views)))
    assert all(torch.equal(ours, wanted) for ours, wanted in zip(actual, expected, strict=True))


@pytest.mark.parametrize("operator", CASES)
def test_unknown_kernels(operator: str) -> None:
    with pytest.raises(ValueError, match=r"^kernels='fastest': must be one of auto, reference, cpu, triton, cuda"):
        SPECS[operator].function(**_kwargs(operator), kernels="fastest")


@pytest.mark.parametrize("operator", CASES)
def test_kernels_of_another_device(operator: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"^kernels='cuda' does not serve tensors on 'cpu'"):
        SPECS[operator].function(**_kwargs(operator), kernels="cuda")
    elsewhere = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in _kwargs(operator).items()}
    with pytest.raises(BackendUnavailable, match=r"^kernels='cpu' does not serve tensors on 'meta'"):
        SPECS[operator].function(**elsewhere, kernels="cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("operator", ["skim_logit", "ragged_attention", "ragged_linear_norm", "ragged_linear_norm_"])
def test_dtype_without_native_kernels(operator: str, dtype: torch.dtype) -> None:
    """The native CPU kernels say which dtypes they take; nothing is converted behind the caller's back."""
    target = Target("cpu", "cpu")
    target.require(operator)
    kwargs = getattr(cases, operator)(Source(dtype), LENGTHS, **CASES[operator])
    with pytest.raises(BackendUnavailable, match=r"cpu: computes in torch.float32, torch.bfloat16, not in"):
        SPECS[operator].function(**clone(kwargs), kernels="cpu")


@pytest.mark.parametrize("operator", ["skim_logit", "ragged_linear", "ragged_linear_norm"])
def test_nan_stays_in_its_row(target: Target, operator: str) -> None:
    target.require(operator)
    kwargs = _kwargs(operator)
    spoilt = "hidden" if operator == "skim_logit" else "x"
    row = 2 if operator == "ragged_linear_norm" else int(kwargs["slots"][2])
    kwargs = {name: x.to(target.device) if isinstance(x, Tensor) else x for name, x in kwargs.items()}
    clean = target.call(SPECS[operator].function, **kwargs)[:5]
    kwargs[spoilt] = kwargs[spoilt].index_fill(0, torch.tensor([row], device=target.device), torch.nan)
    y = target.call(SPECS[operator].function, **kwargs)[:5]
    assert y[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], clean[others])


@pytest.mark.operators("choose_rows")
def test_a_row_whose_weight_is_nan_is_the_layers(target: Target) -> None:
    """It has to show: it would vanish among the skimmed ones."""
    keep = torch.tensor([torch.nan, 1.0, 0.0], device=target.device)
    hidden, final = (torch.full((3, 2), value, device=target.device) for value in (5.0, 7.0))
    chosen = target.call(tk.choose_rows, keep=keep, hidden=hidden, final=final)
    assert chosen[:, 0].tolist() == [5.0, 5.0, 7.0]


@pytest.mark.operators("ragged_attention")
def test_generous_max_seqlen_changes_nothing(target: Target) -> None:
    kwargs = cases.ragged_attention(Source(torch.float32, target.device), (17, 65))
    expected, _, _ = target.call(tk.ragged_attention, **kwargs)
    for longest in (10_000, 2**31 - 1, 2**31):
        kwargs |= {"max_seqlen_q": longest, "max_seqlen_k": 2**31}
        actual, _, _ = target.call(tk.ragged_attention, **kwargs)
        assert torch.equal(actual[:82], expected[:82])


@pytest.mark.operators("ragged_attention", "ragged_attention_backward")
def test_more_tiles_than_a_launch_takes(target: Target) -> None:
    """Many empty sequences with a bound that is far too high: an error, not a count that wraps around."""
    if target.backend not in ("triton", "cuda"):
        pytest.skip(f"{target}: its work is by tokens, not by tiles of the longest sequence")
    rows, batch = 2**17, 2**20  # with 64 rows to a tile, 2^31 tiles
    x = torch.zeros(1, 1, 16, device=target.device).expand(rows, -1, -1)
    heads, lse = (x,) * 3, torch.zeros(1, rows, device=target.device)
    shape = (torch.zeros(batch + 1, dtype=torch.int32, device=target.device),) * 2 + (rows, rows)
    message = f"max_seqlen_.: {rows} rows in each sequence of a batch of {batch} make \\d+ tiles"
    with pytest.raises(ValueError, match=message):
        OPERATORS["ragged_attention"].overload(target.backend)(*heads, *shape, 1.0, None, True)
    with pytest.raises(ValueError, match=message):
        OPERATORS["ragged_attention_backward"].overload(target.backend)(x, *heads, x, lse, *shape, 1.0, None)
