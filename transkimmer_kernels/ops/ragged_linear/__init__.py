"""`ragged_linear` and its normalising variants: matrix products whose row count lives on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...library import define
from ...registry import select
from ..checks import (
    FLOATS,
    check_apart,
    check_cu_seqlens,
    check_slots,
    check_tensor,
    check_weight,
    refuse_gradients,
    require,
)
from ..counting import product_flops, row_count
from ..rows import pick_rows, send_rows_back, zero_tail

ACTIVATIONS = ("none", "gelu")


def _rows_out(x: Tensor, slots: Tensor | None) -> int:
    return x.size(0) if slots is None else slots.numel()


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, slots: Tensor | None, activation: str
) -> Tensor:
    return x.new_empty((_rows_out(x, slots), weight.size(0)))


def _fake_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    residual_slots: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    cu_seqlens: Tensor,
) -> Tensor:
    return x.new_empty((x.size(0), weight.size(0)))


def _fake_norm_(hidden: Tensor, *args: Any) -> None:
    return None


def _flops(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, slots: Tensor | None, activation: str
) -> int:
    return product_flops(row_count(cu_seqlens, _rows_out(x, slots)), weight)


def _flops_norm(x: Tensor, weight: Tensor, *rest: Any) -> int:
    return product_flops(row_count(rest[-1], x.size(0)), weight)


def _flops_norm_(hidden: Tensor, slots: Tensor, *product: Any) -> int:
    return _flops_norm(*product)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _make_backward(backend: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, cu_seqlens, slots = ctx.saved_tensors
        rows, index = pick_rows(x, slots, cu_seqlens)
        grad = zero_tail(grad, cu_seqlens)
        if ctx.activation == "gelu":
            grad = torch.ops.aten.gelu_backward(grad, F.linear(rows, weight, bias))
        grad_x = send_rows_back(grad @ weight, index, x)
        return grad_x, grad.T @ rows, None if bias is None else grad.sum(0), None, None, None

    return backward


def _setup_context_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual, residual_slots, norm_weight, norm_bias, ctx.eps, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, bias, residual, residual_slots, norm_weight, norm_bias, cu_seqlens)


def _make_backward_norm(backend: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, residual_slots, norm_weight, norm_bias, cu_seqlens = ctx.saved_tensors
        rows, _ = pick_rows(x, None, cu_seqlens)
        picked, index = pick_rows(residual, residual_slots, cu_seqlens)
        # A zeroed row has no variance: its 1 / sqrt(eps) overflows fp16, and infinity times no gradient is NaN.
        precision = torch.float32 if x.dtype == torch.float16 else x.dtype
        total = F.linear(rows, weight, bias) + picked[: x.size(0)]
        with torch.enable_grad():
            leaves = tuple(t.detach().to(precision).requires_grad_() for t in (total, norm_weight, norm_bias))
            y = F.layer_norm(leaves[0], (total.size(1),), leaves[1], leaves[2], ctx.eps)
            grads = torch.autograd.grad(y, leaves, zero_tail(grad, cu_seqlens).to(precision))
        grad, grad_norm_weight, grad_norm_bias = (g.to(x.dtype) for g in grads)
        grad = zero_tail(grad, cu_seqlens)
        grad_residual = send_rows_back(grad, index, residual)
        return (
            grad @ weight,
            grad.T @ rows,
            None if bias is None else grad.sum(0),
            grad_residual,
            None,
            grad_norm_weight,
            grad_norm_bias,
            None,
            None,
        )

    return backward


define(
    "ragged_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor cu_seqlens, Tensor? slots, str activation) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    make_backward=_make_backward,
    flops=_flops,
)
define(
    "ragged_linear_norm",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? residual_slots, Tensor norm_weight, "
    "Tensor norm_bias, float eps, Tensor cu_seqlens) -> Tensor",
    fake=_fake_norm,
    setup_context=_setup_context_norm,
    make_backward=_make_backward_norm,
    flops=_flops_norm,
)
define(
    "ragged_linear_norm_",
    "(Tensor(a!) hidden, Tensor slots, Tensor x, Tensor weight, Tensor? bias, Tensor residual, "
    "Tensor norm_weight, Tensor norm_bias, float eps, Tensor cu_seqlens) -> ()",
    fake=_fake_norm_,
    flops=_flops_norm_,
)


def _check_product(name: str, kernels: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor("x", x, dim=2, dtype=FLOATS)
    check_weight("weight", weight, x, (None, x.size(1)), name, kernels)
    if bias is not None:
        check_tensor("bias", bias, dtype=x.dtype, device=x.device, shape=(weight.size(0),))


def _check_norm(x: Tensor, width: int, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> None:
    check_tensor("residual", residual, dtype=x.dtype, device=x.device, shape=(None, width))
    check_tensor("norm_weight", norm_weight, dtype=x.dtype, device=x.device, shape=(width,))
    check_tensor("norm_bias", norm_bias, dtype=x.dtype, device=x.device, shape=(width,))


def ragged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    slots: Tensor | None = None,
    activation: str = "none",
    kernels: str = "auto",
) -> Tensor:
    """activation(rows @ weight^T + bias) for the listed rows, gathered by `slots` on the way in.

    Args:
        x: [rows, in], fp32, bf16 or fp16 (fp64 on `reference`).
        weight: [out, in] or a backend's packed form. bias: [out] or None.
        cu_seqlens: int32 [batch + 1]; its last entry is the number of rows computed.
        slots: int32 [capacity]; None: the first rows of `x` as they stand.
        activation: "none" or "gelu" (exact).
        kernels: backend, see `registry`.

    Returns:
        [capacity, out] (`capacity = rows` without `slots`); undefined at and beyond the token count.
    """
    _check_product("ragged_linear", kernels, x, weight, bias)
    require(activation in ACTIVATIONS, f"activation: must be one of {ACTIVATIONS}, got {activation!r}")
    if slots is None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, x.size(0), x.device)
    else:
        check_tensor("slots", slots, device=x.device)
        check_slots("slots", slots, cu_seqlens, x.size(0))
        slots = slots.contiguous()
    run = select("ragged_linear", kernels, x.device, x.dtype)
    return run(x.contiguous(), weight, bias, cu_seqlens.contiguous(), slots, activation)


def ragged_linear_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cu_seqlens: Tensor,
    *,
    residual_slots: Tensor | None = None,
    eps: float = 1e-12,
    kernels: str = "auto",
) -> Tensor:
    """LayerNorm(x @ weight^T + bias + residual): a post-LN block's output projection, on dense rows.

    Args:
        x: [capacity, in]. weight: [out, in]. bias: [out] or None.
        residual: [rows, out]; row i of the result adds row `residual_slots[i]` of it, or row i without slots.
        norm_weight, norm_bias: [out].
        cu_seqlens: int32 [batch + 1].
        residual_slots: int32 [capacity] or None.
        eps: of the LayerNorm.
        kernels: backend, see `registry`.

    Returns:
        [capacity, out]; undefined at and beyond the token count.
    """
    _check_product("ragged_linear_norm", kernels, x, weight, bias)
    _check_norm(x, weight.size(0), residual, norm_weight, norm_bias)
    check_cu_seqlens("cu_seqlens", cu_seqlens, x.size(0), x.device)
    if residual_slots is not None:
        check_tensor("residual_slots", residual_slots, shape=(x.size(0),))
        check_slots("residual_slots", residual_slots, cu_seqlens, residual.size(0))
        residual_slots = residual_slots.contiguous()
    else:
        require(residual.size(0) == x.size(0), f"residual: expected {x.size(0)} rows like x, got {residual.size(0)}")
    run = select("ragged_linear_norm", kernels, x.device, x.dtype)
    x, residual, cu_seqlens = x.contiguous(), residual.contiguous(), cu_seqlens.contiguous()
    return run(x, weight, bias, residual, residual_slots, norm_weight, norm_bias, eps, cu_seqlens)


def ragged_linear_norm_(
    hidden: Tensor,
    slots: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cu_seqlens: Tensor,
    *,
    eps: float = 1e-12,
    kernels: str = "auto",
) -> Tensor:
    """`hidden[slots[i]] = LayerNorm(x[i] @ weight^T + bias + residual[i])`, in place; other rows stay as they are.

    The end of an encoder layer at inference: survivors are written back to their slots. Not differentiable (use
    `ragged_linear_norm` and `scatter_rows` for that).

    Args:
        hidden: [rows, out], contiguous, written.
        slots: int32 [capacity], distinct.
        x: [capacity, in]. residual: [capacity, out]. Neither may share memory with `hidden`.
        The rest as in `ragged_linear_norm`.

    Returns:
        `hidden`.
    """
    _check_product("ragged_linear_norm_", kernels, x, weight, bias)
    _check_norm(x, weight.size(0), residual, norm_weight, norm_bias)
    tensors = (hidden, x, weight, bias, residual, norm_weight, norm_bias)
    refuse_gradients("ragged_linear_norm_", "use ragged_linear_norm and scatter_rows", *tensors)
    check_tensor("hidden", hidden, dtype=x.dtype, device=x.device, shape=(None, weight.size(0)))
    require(hidden.is_contiguous(), f"hidden: is written in place and must be contiguous, got {hidden.stride()}")
    check_tensor("slots", slots, device=x.device, shape=(x.size(0),))
    check_slots("slots", slots, cu_seqlens, hidden.size(0))
    require(residual.size(0) == x.size(0), f"residual: expected {x.size(0)} rows like x, got {residual.size(0)}")
    run = select("ragged_linear_norm_", kernels, x.device, x.dtype)
    x, residual, slots = x.contiguous(), residual.contiguous(), slots.contiguous()
    check_apart("x", x, hidden)
    check_apart("residual", residual, hidden)
    run(hidden, slots, x, weight, bias, residual, norm_weight, norm_bias, eps, cu_seqlens.contiguous())
    torch.autograd.graph.increment_version(hidden)  # autograd knows of a write by an operator of ours only so
    return hidden
