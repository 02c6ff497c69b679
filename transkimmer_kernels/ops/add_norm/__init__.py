"""`add_norm`: the residual sum and the LayerNorm behind it, for training, with the gradients of both in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...library import OPERATORS, define
from ...registry import select
from ..checks import FLOATS, check_tensor


def sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """The dtype of x + residual."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = sum_dtype(x, residual)
    total = x.new_empty(x.shape if residual is not None else (0, x.size(1)), dtype=dtype)
    y = x.new_empty(x.shape, dtype=torch.promote_types(dtype, weight.dtype))
    return y, total, x.new_empty((2, x.size(0)), dtype=torch.promote_types(dtype, torch.float32))


def _fake_backward(grad: Tensor, total: Tensor, statistics: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _, _ = inputs
    _, total, statistics = output
    ctx.mark_non_differentiable(total, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else total, statistics, weight)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype


def _make_backward(backend: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        run = OPERATORS["add_norm_backward"].overload(backend)
        grad_total, grad_weight, grad_bias = run(grad.contiguous(), *ctx.saved_tensors)
        of_x, of_residual = ctx.dtypes
        grad_residual = None if of_residual is None else grad_total.to(of_residual)
        return grad_total.to(of_x), grad_residual, grad_weight, grad_bias, None

    return backward


define(
    "add_norm_backward",
    "(Tensor grad, Tensor total, Tensor statistics, Tensor weight) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
define(
    "add_norm",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    make_backward=_make_backward,
)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-12,
    kernels: str = "auto",
) -> Tensor:
    """`LayerNorm(x + residual)`, what stands behind every sublayer of BERT; differentiable.

    The sum is rounded to its dtype, as by PyTorch; mean and variance are fp32.

    Args:
        x: [rows, d], fp32, bf16 or fp16 (fp64 on `reference`).
        residual: [rows, d] or None; its dtype may be another one, as under autocast.
        weight, bias: [d], of one dtype, which may differ from that of x.
        eps: of the LayerNorm.
        kernels: backend, see `registry`.

    Returns:
        [rows, d] in the dtype that the arguments' are promoted to.
    """
    check_tensor("x", x, dim=2, dtype=FLOATS)
    if residual is not None:
        check_tensor("residual", residual, dtype=FLOATS, device=x.device, shape=tuple(x.shape))
    check_tensor("weight", weight, dtype=FLOATS, device=x.device, shape=(x.size(1),))
    check_tensor("bias", bias, dtype=weight.dtype, device=x.device, shape=(x.size(1),))
    run = select("add_norm", kernels, x.device, sum_dtype(x, residual))
    y: Tensor = run(x, residual, weight, bias, eps)[0]
    return y
