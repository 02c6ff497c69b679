"""Properties of `skim_tokens` and `encoder_layer_` that a comparison with a formula does not show."""

from __future__ import annotations

import pytest
import torch

import transkimmer_kernels as tk

from ..target import DTYPES, TARGETS, Target
from . import cases
from .cases import LENGTHS, Source
from .operators import clone

with_dtypes = pytest.mark.parametrize(
    ("target", "dtype"),
    [pytest.param(t, d, id=f"{t}-{d}") for t in TARGETS for d in DTYPES[t.backend]],
)


@pytest.mark.operators("skim_tokens", "skim_logit", "compact")
@with_dtypes
@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_decides_like_its_parts(target: Target, dtype: torch.dtype, lengths: str, keep_first: bool) -> None:
    """The very same decisions, also where a logit is within rounding of the threshold."""
    source = Source(dtype, target.device)
    kwargs = cases.skim_tokens(source, LENGTHS[lengths], width=64, inner=32, keep_first=keep_first)
    decision = {name: kwargs.pop(name) for name in ("logit_threshold", "keep_first")}
    logit = target.call(tk.skim_logit, **kwargs)
    lists = {name: kwargs[name] for name in ("slots", "cu_seqlens")}
    count = int(lists["cu_seqlens"][-1])
    if count:
        decision["logit_threshold"] = float(logit[:count].median())  # some logit is exactly the threshold
    keep = ~(logit < decision["logit_threshold"])
    expected_slots, expected_cu = target.call(tk.compact, keep=keep, **lists, keep_first=keep_first)
    slots, cu_seqlens = target.call(tk.skim_tokens, **kwargs, **decision)
    assert slots.shape == lists["slots"].shape
    assert torch.equal(cu_seqlens, expected_cu)
    kept = int(expected_cu[-1])
    assert torch.equal(slots[:kept], expected_slots[:kept])
    assert count < 2 or 0 < kept < count


@pytest.mark.operators("skim_tokens")
@with_dtypes
def test_a_broken_token_stays(target: Target, dtype: torch.dtype) -> None:
    kwargs = cases.skim_tokens(Source(dtype, target.device), (4, 3), width=16, inner=8, keep_first=False)
    kwargs["hidden"][int(kwargs["slots"][2])] = torch.nan
    slots, cu_seqlens = target.call(tk.skim_tokens, **{**kwargs, "logit_threshold": 1e4})
    assert cu_seqlens.tolist() == [0, 1, 1]
    assert slots[0] == kwargs["slots"][2]


@pytest.mark.operators("encoder_layer_")
@with_dtypes
@pytest.mark.parametrize("first_only", [False, True])
def test_only_listed_rows_are_written(target: Target, dtype: torch.dtype, first_only: bool) -> None:
    kwargs = cases.encoder_layer_(Source(dtype, target.device), (5, 0, 2), width=32, heads=2, ff=40)
    if first_only:
        kwargs = cases.encoder_layer_(
            Source(dtype, target.device), (5, 0, 2), width=32, heads=2, ff=40, first_only=True
        )
    slots = kwargs["slots"].tolist()
    written = {slots[0], slots[5]} if first_only else set(slots[:7])
    before = clone(kwargs)["hidden"]
    after = target.call(tk.encoder_layer_, **clone(kwargs))
    changed = {
        row for row in range(before.size(0)) if not torch.equal(before[row].nan_to_num(), after[row].nan_to_num())
    }
    assert changed == written
    assert after[sorted(written)].isfinite().all()


@pytest.mark.operators("encoder_layer_")
def test_a_sequence_does_not_see_its_neighbours(target: Target) -> None:
    """NaN in one sequence: the other's rows keep their bits."""
    kwargs = cases.encoder_layer_(Source(torch.float32, target.device), (5, 4), width=32, heads=2, ff=40)
    first, second = (kwargs["slots"][part].long() for part in (slice(0, 5), slice(5, 9)))
    clean = target.call(tk.encoder_layer_, **clone(kwargs))
    kwargs["hidden"][first[3]] = torch.nan
    spoilt = target.call(tk.encoder_layer_, **clone(kwargs))
    assert torch.equal(spoilt[second], clean[second])
    assert spoilt[first].isnan().all()


@pytest.mark.operators("encoder_layer_")
def test_a_gradient_is_refused(target: Target) -> None:
    kwargs = cases.encoder_layer_(Source(torch.float32, target.device), (3,), width=16, heads=2, ff=8)
    kwargs["ffn_in_weight"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"^encoder_layer_: not differentiable"):
        tk.encoder_layer_(**kwargs, kernels=target.backend)
