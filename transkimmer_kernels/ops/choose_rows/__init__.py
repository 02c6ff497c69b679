"""`choose_rows`: what becomes of a layer's output under the decisions of a training forward, in one pass each way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...library import OPERATORS, define
from ...registry import select
from ..checks import FLOATS, check_tensor


def _fake(keep: Tensor, hidden: Tensor, final: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _fake_backward(
    grad: Tensor, keep: Tensor, hidden: Tensor, final: Tensor, of_keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    of_rows = grad.new_empty(grad.shape), grad.new_empty(grad.shape)
    return keep.new_empty(keep.size(0) if of_keep else 0), *of_rows


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _make_backward(backend: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = OPERATORS["choose_rows_backward"].overload(backend)
        of_keep = ctx.needs_input_grad[0]
        grad_keep, grad_hidden, grad_final = run(grad.contiguous(), *ctx.saved_tensors, of_keep)
        return grad_keep if of_keep else None, grad_hidden, grad_final

    return backward


define(
    "choose_rows_backward",
    "(Tensor grad, Tensor keep, Tensor hidden, Tensor final, bool of_keep) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
define(
    "choose_rows",
    "(Tensor keep, Tensor hidden, Tensor final) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    make_backward=_make_backward,
)


def choose_rows(keep: Tensor, hidden: Tensor, final: Tensor, *, kernels: str = "auto") -> Tensor:
    """Kept rows of `hidden`, a layer's output; of `final` the others, as they were when they left.

    Values and gradients are those of final + keep * (hidden - final) in fp32, without the copies in fp32 that autograd
    would store for it. A row whose weight is NaN is taken from `hidden`, and gives NaN gradients.

    Args:
        keep: fp32 [rows], 0 or 1; its gradient is that of a weight (fp64 with fp64 rows).
        hidden, final: [rows, d], of one dtype: fp32, bf16 or fp16 (fp64 on `reference`).
        kernels: backend, see `registry`.
    """
    check_tensor("hidden", hidden, dim=2, dtype=FLOATS)
    check_tensor("final", final, dtype=hidden.dtype, device=hidden.device, shape=tuple(hidden.shape))
    weights = torch.promote_types(hidden.dtype, torch.float32)
    check_tensor("keep", keep, dtype=weights, device=hidden.device, shape=(hidden.size(0),))
    chosen: Tensor = select("choose_rows", kernels, hidden.device, hidden.dtype)(keep, hidden, final)
    return chosen
