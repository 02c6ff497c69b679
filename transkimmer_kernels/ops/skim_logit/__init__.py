"""`skim_logit`: the skim predictor's decision value for every listed token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...library import define
from ...registry import select
from ..checks import FLOATS, check_slots, check_tensor, check_weight
from ..counting import product_flops, row_count
from ..rows import pick_rows, send_rows_back, zero_tail

WEIGHTS = (
    "norm1_weight",
    "norm1_bias",
    "fc_weight",
    "fc_bias",
    "norm2_weight",
    "norm2_bias",
    "out_weight",
    "out_bias",
)


def _fake(hidden: Tensor, slots: Tensor, cu_seqlens: Tensor, *weights_and_eps: Any) -> Tensor:
    return hidden.new_empty((slots.numel(),), dtype=torch.promote_types(hidden.dtype, torch.float32))


def predictor_flops(rows: int, fc_weight: Tensor, out_weight: Tensor) -> int:
    """FLOPs of the difference of the two outputs, which is one dot product; the paper's Linear has both."""
    return product_flops(rows, fc_weight) + 2 * rows * out_weight.numel()


def _flops(hidden: Tensor, slots: Tensor, cu_seqlens: Tensor, *weights_and_eps: Any) -> int:
    weights = dict(zip(WEIGHTS, weights_and_eps, strict=False))
    return predictor_flops(row_count(cu_seqlens, slots.numel()), weights["fc_weight"], weights["out_weight"])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _make_backward(backend: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Recomputes the small network: keeping its two hidden rows per token would cost more than it saves.
        from .reference import skim_logit_rows

        hidden, slots, cu_seqlens, *weights = ctx.saved_tensors
        rows, index = pick_rows(hidden.detach(), slots, cu_seqlens)
        with torch.enable_grad():
            x = rows.requires_grad_()
            leaves = [w.detach().requires_grad_() for w in weights]
            logit = skim_logit_rows(x, *leaves, ctx.eps)  # type: ignore[call-arg]  # eight leaves
            grads = torch.autograd.grad(logit, (x, *leaves), zero_tail(grad, cu_seqlens))
        return send_rows_back(grads[0], index, hidden), None, None, *grads[1:], None

    return backward


define(
    "skim_logit",
    "(Tensor hidden, Tensor slots, Tensor cu_seqlens, "
    + ", ".join(f"Tensor {name}" for name in WEIGHTS)
    + ", float eps) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    make_backward=_make_backward,
    flops=_flops,
)


def skim_logit(
    hidden: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    eps: float = 1e-5,
    kernels: str = "auto",
) -> Tensor:
    """Keep-minus-skim logit of the predictor LayerNorm -> Linear -> LayerNorm -> GELU -> Linear (Transkimmer, Eq. 2).

    Only the difference of the two output columns matters for a decision, so the last layer is one dot product:
    `out_weight = W[keep] - W[skim]`, `out_bias = b[keep] - b[skim]`.

    Args:
        hidden: [rows, d], fp32, bf16 or fp16 (fp64 on `reference`).
        slots: int32 [capacity]; cu_seqlens: int32 [batch + 1].
        norm1_weight, norm1_bias: [d]. fc_weight: [m, d] (or a backend's packed form), fc_bias: [m].
        norm2_weight, norm2_bias, out_weight: [m]. out_bias: [1]. All in `hidden`'s dtype.
        eps: of both LayerNorms.
        kernels: backend, see `registry`.

    Returns:
        fp32 [capacity] by list position; undefined at and beyond the token count. keep iff logit >= log(t / (1 - t))
        for a threshold t on the keep probability.
    """
    weights = (norm1_weight, norm1_bias, fc_weight, fc_bias, norm2_weight, norm2_bias, out_weight, out_bias)
    check_predictor("skim_logit", kernels, hidden, slots, cu_seqlens, weights)
    run = select("skim_logit", kernels, hidden.device, hidden.dtype)
    return run(hidden.contiguous(), slots.contiguous(), cu_seqlens.contiguous(), *weights, eps)


def check_predictor(
    name: str, kernels: str, hidden: Tensor, slots: Tensor, cu_seqlens: Tensor, weights: tuple[Tensor, ...]
) -> None:
    """The arguments of `skim_logit`, for operator `name`; `weights` in the order of `WEIGHTS`."""
    check_tensor("hidden", hidden, dim=2, dtype=FLOATS)
    check_tensor("slots", slots, device=hidden.device)
    check_slots("slots", slots, cu_seqlens, hidden.size(0))
    width, inner = hidden.size(1), weights[WEIGHTS.index("fc_bias")].numel()
    shapes = ((width,), (width,), (inner, width), (inner,), (inner,), (inner,), (inner,), (1,))
    for argument, weight, shape in zip(WEIGHTS, weights, shapes, strict=True):
        if len(shape) == 2:
            check_weight(argument, weight, hidden, shape, name, kernels)
        else:
            check_tensor(argument, weight, dtype=hidden.dtype, device=hidden.device, shape=shape)
