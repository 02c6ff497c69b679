"""`gather_rows` and `scatter_rows`: variable-length row movement by `slots`; each is the other's backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...library import OPERATORS, define
from ...registry import select
from ..checks import check_slots, check_tensor, require


def _fake_gather(x: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Tensor:
    return x.new_empty((slots.numel(), *x.shape[1:]))


def _fake_scatter(x: Tensor, slots: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor:
    return x.new_empty((num_rows, *x.shape[1:]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, slots, cu_seqlens = inputs[:3]
    ctx.save_for_backward(slots, cu_seqlens)
    ctx.num_rows = x.size(0)


def _gather_backward(backend: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slots, cu_seqlens = ctx.saved_tensors
        scatter = OPERATORS["scatter_rows"].overload(backend)
        return scatter(grad.contiguous(), slots, cu_seqlens, ctx.num_rows), None, None

    return backward


def _scatter_backward(backend: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slots, cu_seqlens = ctx.saved_tensors
        gathered = OPERATORS["gather_rows"].overload(backend)(grad.contiguous(), slots, cu_seqlens)
        return zero_tail(gathered, cu_seqlens), None, None, None

    return backward


def zero_tail(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Zeroes the rows at and beyond the token count: a gradient must be defined there, an activation need not be."""
    index = cu_seqlens.new_ones(rows.size(0)).cumsum(0)  # 1-based row number
    beyond = (index > cu_seqlens[-1]).view(-1, *[1] * (rows.dim() - 1))
    return rows.masked_fill(beyond, 0)


def pick_rows(rows: Tensor, slots: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Listed rows with a zeroed tail, and the row numbers to send gradients back to. No host read.

    The tail of `slots` is garbage: it is pointed at row 0 before it is used as an index.
    """
    if slots is None:
        return zero_tail(rows, cu_seqlens), None
    index = zero_tail(slots, cu_seqlens).long()
    if rows.size(0) == 0:  # then there is no row 0 either, and nothing is listed
        return rows.new_zeros((slots.numel(), *rows.shape[1:])), index
    return zero_tail(rows[index], cu_seqlens), index


def send_rows_back(grad: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of `like`, of which `pick_rows` has picked rows, from theirs."""
    if index is None:
        return grad
    total = torch.zeros_like(like)
    # The tail's gradient is zero, so that adding it to row 0 changes nothing.
    return total.index_add_(0, index, grad) if like.size(0) else total


define(
    "gather_rows",
    "(Tensor x, Tensor slots, Tensor cu_seqlens) -> Tensor",
    fake=_fake_gather,
    setup_context=_save,
    make_backward=_gather_backward,
)
define(
    "scatter_rows",
    "(Tensor x, Tensor slots, Tensor cu_seqlens, SymInt num_rows) -> Tensor",
    fake=_fake_scatter,
    setup_context=_save,
    make_backward=_scatter_backward,
)


def gather_rows(x: Tensor, slots: Tensor, cu_seqlens: Tensor, *, kernels: str = "auto") -> Tensor:
    """`y[i] = x[slots[i]]` for the listed tokens.

    Args:
        x: [rows, ...], any dtype.
        slots: int32 [capacity], distinct row numbers; the first `cu_seqlens[-1]` are valid.
        cu_seqlens: int32 [batch + 1].
        kernels: backend, see `registry`.

    Returns:
        [capacity, ...] in `x`'s dtype; rows at and beyond the token count are undefined.
    """
    check_tensor("x", x, device=slots.device)
    require(x.dim() >= 1, f"x: expected at least one dimension, got {list(x.shape)}")
    check_slots("slots", slots, cu_seqlens, x.size(0))
    run = select("gather_rows", kernels, x.device)
    return run(x.contiguous(), slots.contiguous(), cu_seqlens.contiguous())


def scatter_rows(x: Tensor, slots: Tensor, cu_seqlens: Tensor, num_rows: int, *, kernels: str = "auto") -> Tensor:
    """Zeros of `num_rows` rows with `y[slots[i]] = x[i]` for the listed tokens: the inverse of `gather_rows`.

    Args:
        x: [capacity, ...]; rows at and beyond the token count are ignored.
        slots: int32 [capacity], distinct row numbers below `num_rows`.
        cu_seqlens: int32 [batch + 1].
        num_rows: rows of the result.
        kernels: backend, see `registry`.
    """
    check_tensor("x", x, device=slots.device)
    require(x.dim() >= 1, f"x: expected at least one dimension, got {list(x.shape)}")
    require(num_rows >= 0, f"num_rows: must not be negative, got {num_rows}")
    require(x.size(0) == slots.numel(), f"x: expected {slots.numel()} rows, one per slot, got {list(x.shape)}")
    check_slots("slots", slots, cu_seqlens, num_rows)
    run = select("scatter_rows", kernels, x.device)
    return run(x.contiguous(), slots.contiguous(), cu_seqlens.contiguous(), num_rows)
