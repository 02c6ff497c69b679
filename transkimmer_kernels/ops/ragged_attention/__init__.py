"""`ragged_attention`: softmax attention inside each sequence of a packed batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...library import OPERATORS, define
from ...registry import select
from ..checks import FLOATS, check_cu_seqlens, check_max_seqlen, check_tensor, require
from ..counting import pair_count


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    keep: Tensor | None,
    return_importance: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    precision = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty((q.size(1), q.size(0)), dtype=precision)
    return out, lse, q.new_empty((k.size(0) if return_importance else 0,), dtype=precision)


def _fake_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    grad_keep = lse.new_empty((0,)) if keep is None else torch.empty_like(keep)
    return grads[0], grads[1], grads[2], grad_keep


def _flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *rest: Any,
) -> int:
    """Two products, scores and values; keys of weight 0 are also computed and counted."""
    return 2 * 2 * pair_count(cu_seqlens_q, cu_seqlens_k, q.size(0), max_seqlen_k) * q.size(1) * q.size(2)


def _flops_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *rest: Any,
) -> int:
    """Five products: the scores once more, and the gradients of P, of the queries, of the keys and of the values."""
    pairs = pair_count(cu_seqlens_q, cu_seqlens_k, q.size(0), rest[1])
    return 5 * 2 * pairs * q.size(1) * q.size(2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, keep, _ = inputs
    out, lse, _ = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, keep)
    ctx.lengths_and_scale = max_seqlen_q, max_seqlen_k, scale
    # The statistics are read-outs: a loss on them would need another backward (one extra value column).
    ctx.set_materialize_grads(False)


def _make_backward(backend: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_importance: Tensor | None) -> Any:
        if grad_lse is not None or grad_importance is not None:
            raise RuntimeError(
                "ragged_attention: gradients flow through `out` only; detach `lse` and `importance` before using "
                "them in a loss"
            )
        if grad_out is None:
            return (None,) * 10
        *tensors, keep = ctx.saved_tensors
        run = OPERATORS["ragged_attention_backward"].overload(backend)
        grad_q, grad_k, grad_v, grad_keep = run(grad_out.contiguous(), *tensors, *ctx.lengths_and_scale, keep)
        return grad_q, grad_k, grad_v, *(None,) * 5, None if keep is None else grad_keep, None

    return backward


define(
    "ragged_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, Tensor? keep)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    flops=_flops_backward,
)
define(
    "ragged_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float scale, Tensor? keep, bool return_importance) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup_context,
    make_backward=_make_backward,
    flops=_flops,
)


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    keep: Tensor | None = None,
    return_importance: bool = False,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each sequence's queries to its own keys, without padding and without materialised scores.

    With `keep`, a weight per key stands inside the softmax, so that removing a key and weighting it 0 are the same
    thing: `P_ij = keep_j exp(S_ij) / sum_k keep_k exp(S_ik)`, `S = scale q k^T`. Its gradient is defined for kept and
    for skimmed keys (Transkimmer, section 3.3, renormalised).

    Args:
        q: [capacity_q, heads, head_dim], fp32, bf16 or fp16 (fp64 on `reference`); views with a contiguous last
            dimension (slices of one fused projection) are taken as they are. `triton` and `cuda` refuse a head_dim
            above 128.
        k, v: [capacity_k, heads, head_dim], like `q`.
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1]; rows at and beyond the last offset are ignored.
        max_seqlen_q, max_seqlen_k: upper bounds of the sequence lengths; never read back from the device.
        scale: factor of the scores, `head_dim ** -0.5` by default.
        keep: fp32 [capacity_k], non-negative (fp64 with fp64 inputs).
        return_importance: also return the column sums of P.
        kernels: backend, see `registry`.

    Returns:
        `out` [capacity_q, heads, head_dim] in `q`'s dtype (0 for a query without any kept key), `lse` fp32
        [heads, capacity_q] (-inf there), and `importance` fp32 [capacity_k], the sum over heads and queries of P, or
        [0] when not asked for. Gradients flow through `out`.
    """
    check_tensor("q", q, dim=3, dtype=FLOATS)
    require(q.size(2) > 0 and q.size(1) > 0, f"q: needs at least one head and head_dim > 0, got {list(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, dtype=q.dtype, device=q.device, shape=(None, q.size(1), q.size(2)))
    require(k.size(0) == v.size(0), f"v: expected {k.size(0)} rows like k, got {v.size(0)}")
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.size(0), q.device)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.size(0), q.device)
    require(
        cu_seqlens_q.numel() == cu_seqlens_k.numel(),
        f"cu_seqlens_k: expected {cu_seqlens_q.numel()} entries like cu_seqlens_q, got {cu_seqlens_k.numel()}",
    )
    check_max_seqlen("max_seqlen_q", max_seqlen_q, cu_seqlens_q)
    check_max_seqlen("max_seqlen_k", max_seqlen_k, cu_seqlens_k)
    if keep is not None:
        precision = torch.promote_types(q.dtype, torch.float32)
        check_tensor("keep", keep, dtype=precision, device=q.device, shape=(k.size(0),))
        keep = keep.contiguous()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scale = q.size(2) ** -0.5 if scale is None else float(scale)
    run = select("ragged_attention", kernels, q.device, q.dtype)
    offsets = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    return run(q, k, v, *offsets, max_seqlen_q, max_seqlen_k, scale, keep, return_importance)
