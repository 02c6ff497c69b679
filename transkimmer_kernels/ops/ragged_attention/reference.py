from __future__ import annotations

import torch
from torch import Tensor

from ...library import implement

# A skimmed key stands outside the normaliser, so exp(S - lse) may exceed 1 without bound.
MAX_EXPONENT = 80.0


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return [(slice(q[b], q[b + 1]), slice(k[b], k[b + 1])) for b in range(len(q) - 1)]


@implement("ragged_attention", "reference")
def ragged_attention(
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
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_full((q.size(1), q.size(0)), -torch.inf, dtype=precision)
    importance = q.new_zeros((k.size(0) if return_importance else 0,), dtype=precision)
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        qs, ks, vs = (x.transpose(0, 1).to(precision) for x in (q[rows], k[keys], v[keys]))  # [H, n, D]
        scores = scale * qs @ ks.transpose(1, 2)  # [H, n_q, n_k]
        if keep is not None:
            scores = scores + keep[keys].log()
        lse[:, rows] = scores.logsumexp(-1)
        # A query whose keys all have weight 0 has lse = -inf: its row of P is 0. Any other NaN is the caller's own.
        p = scores.softmax(-1).masked_fill(lse[:, rows].unsqueeze(-1) == -torch.inf, 0.0)
        out[rows] = (p @ vs).transpose(0, 1).to(q.dtype)
        if return_importance:
            importance[keys] = p.sum((0, 1))
    return out, lse, importance


@implement("ragged_attention_backward", "reference")
def ragged_attention_backward(
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
    precision = torch.promote_types(q.dtype, torch.float32)
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    grad_keep = lse.new_zeros((0,)) if keep is None else torch.zeros_like(keep)
    for rows, keys in _sequences(cu_seqlens_q, cu_seqlens_k):
        qs, ks, vs = (x.transpose(0, 1).to(precision) for x in (q[rows], k[keys], v[keys]))  # [H, n, D]
        d_out, o = (x[rows].transpose(0, 1).to(precision) for x in (grad_out, out))  # [H, n_q, D]
        # exp(S - lse): P without the key's own weight; 0 where a query has no key at all.
        exponent = scale * qs @ ks.transpose(1, 2) - lse[:, rows].unsqueeze(-1)
        e = exponent.clamp(max=MAX_EXPONENT).exp().masked_fill(lse[:, rows].isinf().unsqueeze(-1), 0.0)
        slope = d_out @ vs.transpose(1, 2) - (d_out * o).sum(-1, keepdim=True)  # dO_i.v_j - D_i
        p = e if keep is None else e * keep[keys]
        d_scores = scale * p * slope
        grad_q[rows] = (d_scores @ ks).transpose(0, 1).to(q.dtype)
        grad_k[keys] = (d_scores.transpose(1, 2) @ qs).transpose(0, 1).to(k.dtype)
        grad_v[keys] = (p.transpose(1, 2) @ d_out).transpose(0, 1).to(v.dtype)
        if keep is not None:
            grad_keep[keys] = (e * slope).sum((0, 1))
    return grad_q, grad_k, grad_v, grad_keep
