"""Every operator in plain PyTorch, one formula for two uses: oracle in fp64, yardstick in the tested dtype.

Each function takes what the public function takes and returns the valid part of its outputs only (`valid` cuts the
same part out of real outputs). Everything is differentiable by autograd. Written apart from the `reference` backend,
which is under test like any other.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = tuple[Tensor, ...]


def _listed(slots: Tensor, cu_seqlens: Tensor) -> Tensor:
    return slots[: int(cu_seqlens[-1])].long()


def compact(*, keep: Tensor, slots: Tensor, cu_seqlens: Tensor, keep_first: bool) -> Outputs:
    kept, ends, bounds = [], [0], cu_seqlens.tolist()
    for begin, end in itertools.pairwise(bounds):
        kept += [int(slots[i]) for i in range(begin, end) if bool(keep[i]) or (keep_first and i == begin)]
        ends.append(len(kept))
    new_slots, new_cu_seqlens = (torch.tensor(x, dtype=torch.int32, device=slots.device) for x in (kept, ends))
    return new_slots, new_cu_seqlens


def gather_rows(*, x: Tensor, slots: Tensor, cu_seqlens: Tensor) -> Outputs:
    return (x[_listed(slots, cu_seqlens)],)


def scatter_rows(*, x: Tensor, slots: Tensor, cu_seqlens: Tensor, num_rows: int) -> Outputs:
    listed = _listed(slots, cu_seqlens)
    return (x.new_zeros(num_rows, *x.shape[1:]).index_put((listed,), x[: listed.numel()]),)


def skim_logit(*, hidden: Tensor, slots: Tensor, cu_seqlens: Tensor, eps: float = 1e-5, **w: Tensor) -> Outputs:
    x = hidden[_listed(slots, cu_seqlens)]
    x = F.layer_norm(x, x.shape[1:], w["norm1_weight"], w["norm1_bias"], eps)
    x = F.linear(x, w["fc_weight"], w["fc_bias"])
    x = F.gelu(F.layer_norm(x, x.shape[1:], w["norm2_weight"], w["norm2_bias"], eps))
    return (F.linear(x, w["out_weight"][None], w["out_bias"]).squeeze(1),)


def ragged_attention(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float | None = None,
    keep: Tensor | None = None,
    return_importance: bool = False,
    **_: Any,
) -> Outputs:
    scale = q.size(2) ** -0.5 if scale is None else scale
    out, lse, importance = [q[:0]], [q[:0, :, 0].T], [k[:0, 0, 0]]
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_bounds) - 1):
        rows, keys = slice(q_bounds[b], q_bounds[b + 1]), slice(k_bounds[b], k_bounds[b + 1])
        qs, ks, vs = (x.transpose(0, 1) for x in (q[rows], k[keys], v[keys]))  # [H, n, D]
        p, log_total = softmax(scale * qs @ ks.transpose(1, 2), None if keep is None else keep[keys])
        out.append((p @ vs).transpose(0, 1))
        lse.append(log_total)
        importance.append(p.sum((0, 1)))
    return torch.cat(out), torch.cat(lse, 1), torch.cat(importance) if return_importance else k[:0, 0, 0]


def softmax(scores: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """keep_j e^{S_ij} / sum_k keep_k e^{S_ik} and the logarithm of the sum; 0 and -inf where no key is kept.

    A weight is a factor here, not a logarithm added to the scores, so that autograd knows its slope at 0.
    """
    if scores.size(-1) == 0:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    if keep is None:
        return scores.softmax(-1), scores.logsumexp(-1)
    top = scores.amax(-1, keepdim=True).detach()
    weight = (scores - top).exp() * keep
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total > 0, total, 1), (total.log() + top).squeeze(-1)


def attention_terms(
    upstream: Tensor,
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float | None = None,
    keep: Tensor | None = None,
    **_: Any,
) -> dict[str, Tensor]:
    """How large the terms are that a fused kernel adds up for each gradient and for the importance; all in fp64.

    It computes P = exp(S - lse) in fp32 from a finished lse, whose relative error is a unit of |S| + |lse|, and
    subtracts D_i = dO_i . O_i from dO_i . v_j, which cancel entirely for a single key: so the terms are those of the
    formulas with every factor replaced by its magnitude.
    """
    scale = q.size(2) ** -0.5 if scale is None else scale
    terms = {"q": torch.zeros_like(q), "k": torch.zeros_like(k), "v": torch.zeros_like(v)}
    terms |= {name: k.new_zeros(k.size(0)) for name in ("keep", "importance")}
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_bounds) - 1):
        rows, keys = slice(q_bounds[b], q_bounds[b + 1]), slice(k_bounds[b], k_bounds[b + 1])
        if keys.start == keys.stop:
            continue
        qs, ks, vs, d_out = (x.transpose(0, 1) for x in (q[rows], k[keys], v[keys], upstream[rows]))  # [H, n, D]
        scores = scale * qs @ ks.transpose(1, 2)
        p, lse = softmax(scores, None if keep is None else keep[keys])
        size = 1 + scale * qs.abs() @ ks.abs().transpose(1, 2) + lse.abs().unsqueeze(-1)
        slope = d_out.abs() @ vs.abs().transpose(1, 2) + (d_out * (p @ vs)).abs().sum(-1, keepdim=True)
        d_scores = scale * p * size * slope
        terms["q"][rows] = (d_scores @ ks.abs()).transpose(0, 1)
        terms["k"][keys] = (d_scores.transpose(1, 2) @ qs.abs()).transpose(0, 1)
        terms["v"][keys] = ((p * size).transpose(1, 2) @ d_out.abs()).transpose(0, 1)
        terms["keep"][keys] = ((scores - lse.unsqueeze(-1)).exp() * size * slope).sum((0, 1))
        terms["importance"][keys] = (p * size).sum((0, 1))
    terms["importance"] = terms["importance"][: k_bounds[-1]]
    return terms


def ragged_linear(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    slots: Tensor | None,
    activation: str,
) -> Outputs:
    y = F.linear(x[: int(cu_seqlens[-1])] if slots is None else x[_listed(slots, cu_seqlens)], weight, bias)
    return (F.gelu(y) if activation == "gelu" else y,)


def ragged_linear_norm(
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    residual_slots: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-12,
) -> Outputs:
    count = int(cu_seqlens[-1])
    picked = residual[:count] if residual_slots is None else residual[_listed(residual_slots, cu_seqlens)]
    total = F.linear(x[:count], weight, bias) + picked
    return (F.layer_norm(total, total.shape[1:], norm_weight, norm_bias, eps),)


def ragged_linear_norm_(*, hidden: Tensor, slots: Tensor, **kwargs: Any) -> Outputs:
    """Only the rows that are written."""
    return ragged_linear_norm(**kwargs, residual_slots=None)


def encoder_layer_(
    *,
    hidden: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    activation: str,
    **w: Any,
) -> Outputs:
    """Only the rows that are written."""
    width, bounds = hidden.size(1), cu_seqlens.tolist()
    x = hidden[_listed(slots, cu_seqlens)]
    projected = F.linear(x, qkv_weight, qkv_bias)
    written = torch.arange(x.size(0))
    if query_weight is not None:
        written = torch.tensor([begin for begin, end in itertools.pairwise(bounds) if begin < end]).long()
        projected = torch.cat([F.linear(x, query_weight, query_bias), projected], 1)
    q, k, v = (part.unflatten(1, (num_heads, -1)) for part in projected.split(width, 1))
    context = ragged_attention(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)[0]
    x, context = x[written.to(x.device)], context[written.to(x.device)].flatten(1)
    x = x + F.linear(context, w["out_weight"], w["out_bias"])
    x = F.layer_norm(x, x.shape[1:], w["norm1_weight"], w["norm1_bias"], 1e-12)
    inner = F.linear(x, w["ffn_in_weight"], w["ffn_in_bias"])
    inner = F.gelu(inner) if activation == "gelu" else inner
    x = x + F.linear(inner, w["ffn_out_weight"], w["ffn_out_bias"])
    return (F.layer_norm(x, x.shape[1:], w["norm2_weight"], w["norm2_bias"], 1e-12),)


def embed_tokens(
    *,
    input_ids: Tensor,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor,
    type_weight: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-12,
) -> Outputs:
    places = torch.arange(input_ids.size(1), device=input_ids.device)[None] if position_ids is None else position_ids
    total = word_weight[input_ids.long()] + position_weight[places.long()]
    if type_weight is not None:
        kinds = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        total = total + type_weight[kinds.long()]
    return (F.layer_norm(total, norm_weight.shape, norm_weight, norm_bias, eps),)


def add_norm(*, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-12) -> Outputs:
    total = x if residual is None else x + residual
    return (F.layer_norm(total, weight.shape, weight, bias, eps),)


def choose_rows(*, keep: Tensor, hidden: Tensor, final: Tensor) -> Outputs:
    return (final + keep[:, None] * (hidden - final),)


def valid(operator: str, kwargs: dict[str, Any], outputs: Any) -> Outputs:
    """The part of an operator's outputs that its contract defines."""
    if operator == "ragged_attention":
        out, lse, importance = outputs
        count_q, count_k = int(kwargs["cu_seqlens_q"][-1]), int(kwargs["cu_seqlens_k"][-1])
        return out[:count_q], lse[:, :count_q], importance[:count_k]
    if operator in ("compact", "skim_tokens"):
        slots, cu_seqlens = outputs
        return slots[: int(cu_seqlens[-1])], cu_seqlens
    if operator in ("scatter_rows", "embed_tokens", "add_norm", "choose_rows"):
        return (outputs,)
    if operator in ("ragged_linear_norm_", "encoder_layer_"):
        listed, starts = _listed(kwargs["slots"], kwargs["cu_seqlens"]), kwargs["cu_seqlens"][:-1].long()
        if kwargs.get("query_weight") is not None:
            listed = listed[starts[kwargs["cu_seqlens"].diff() > 0]]
        return (outputs[listed],)
    return (outputs[: int(kwargs["cu_seqlens"][-1])],)
