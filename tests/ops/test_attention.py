"""Properties of `ragged_attention` that a comparison with a formula does not show."""

from __future__ import annotations

import pytest
import torch

import transkimmer_kernels as tk

from ..target import DTYPES, TARGETS, Target
from . import cases, oracle
from .cases import Source, offsets
from .closeness import assert_close_as_torch
from .operators import SPECS, cast

SPEC = SPECS["ragged_attention"]
LENGTHS = (17, 0, 65, 1, 130)
SHORT = (17, 0, 25, 1, 3, 30, 9)  # several in a tile, where a kernel packs them
with_dtypes = pytest.mark.parametrize(
    ("target", "dtype"),
    [pytest.param(t, d, id=f"{t}-{d}") for t in TARGETS for d in DTYPES[t.backend]],
)
attention = pytest.mark.operators("ragged_attention")


@attention
@with_dtypes
def test_importance_sums_to_heads_times_queries(target: Target, dtype: torch.dtype) -> None:
    """A row of P sums to 1, so the column sums of a sequence add up to heads * length; a skimmed key gets nothing."""
    for keep in (None, "mixed"):
        kwargs = cases.ragged_attention(Source(dtype, target.device), LENGTHS, heads=3, importance=True, keep=keep)
        _, _, importance = target.call(tk.ragged_attention, **kwargs)
        sums = [part.sum().item() for part in importance[: sum(LENGTHS)].double().cpu().split(LENGTHS)]
        # P is rounded at most to the dtype before it is summed.
        assert sums == pytest.approx([3 * n for n in LENGTHS], rel=torch.finfo(dtype).eps)
        if keep is not None:
            assert importance[: sum(LENGTHS)][kwargs["keep"][: sum(LENGTHS)] == 0].count_nonzero() == 0


@attention
def test_importance_is_deterministic(target: Target) -> None:
    """Thresholds and top-k selections are made of it."""
    kwargs = cases.ragged_attention(Source(torch.float32, target.device), (300, 17, 257), importance=True)
    first, second = (target.call(tk.ragged_attention, **kwargs)[2] for _ in range(2))
    assert torch.equal(first[:574], second[:574])


@attention
@pytest.mark.parametrize("lengths", [LENGTHS, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("importance", [False, True], ids=["", "importance"])
def test_batch_mates_do_not_matter_bit_for_bit(
    target: Target, lengths: tuple[int, ...], dtype: torch.dtype, importance: bool
) -> None:
    """Other values in the other sequences, even NaN: the same bits in this one."""
    source = Source(dtype, target.device)
    kwargs = cases.ragged_attention(source, lengths, importance=importance, keep="mixed")
    own = slice(lengths[0], lengths[0] + lengths[2])
    expected = target.call(tk.ragged_attention, **kwargs)
    for foreign in (3.0, torch.nan, torch.inf):
        changed = {name: kwargs[name].clone() for name in ("q", "k", "v")}
        for x in changed.values():
            x[: own.start], x[own.stop :] = foreign, foreign
        out, lse, sums = target.call(tk.ragged_attention, **{**kwargs, **changed})
        assert torch.equal(out[own], expected[0][own])
        assert torch.equal(lse[:, own], expected[1][:, own])
        assert torch.equal(sums[own], expected[2][own])


@attention
@with_dtypes
def test_order_and_company_of_sequences_do_not_matter(target: Target, dtype: torch.dtype) -> None:
    """Each sequence alone, and all of them backwards, are as close to the oracle as in the first order."""
    kwargs = cases.ragged_attention(Source(dtype, target.device), LENGTHS, spare=0, layout="dense")
    truth, yardstick = SPEC.oracle(kwargs, torch.float64)[0], SPEC.oracle(kwargs, dtype)[0]
    rows = list(torch.arange(sum(LENGTHS)).split(LENGTHS))
    for order in (*([b] for b in range(len(LENGTHS))), range(len(LENGTHS))[::-1]):
        index = torch.cat([rows[b] for b in order]).to(target.device)
        lengths = [LENGTHS[b] for b in order]
        permuted = {name: kwargs[name][index] for name in ("q", "k", "v")}
        permuted |= {f"cu_seqlens_{side}": offsets(lengths, target.device) for side in "qk"}
        out, _, _ = target.call(tk.ragged_attention, **{**kwargs, **permuted})
        assert_close_as_torch(out, truth[index], yardstick[index], name=f"sequences {list(order)}")


@attention
@with_dtypes
def test_weight_zero_is_removal(target: Target, dtype: torch.dtype) -> None:
    """METHODS 9.6.2 for one attention: weighting keys 0 and leaving them out are the same thing."""
    kwargs = cases.ragged_attention(Source(dtype, target.device), LENGTHS, spare=0, layout="dense", importance=True)
    keep = kwargs["keep"] = Source(torch.float32, target.device).keep_weights(LENGTHS, sum(LENGTHS), "mixed").ceil()
    kept = keep.bool()
    key_lengths = [int(part.sum()) for part in kept.split(LENGTHS)]
    removed = {
        **kwargs,
        "k": kwargs["k"][kept],
        "v": kwargs["v"][kept],
        "cu_seqlens_k": offsets(key_lengths, target.device),
        "keep": None,
    }
    truth, yardstick = SPEC.oracle(removed, torch.float64), SPEC.oracle(removed, dtype)
    terms = SPEC.terms(removed, truth[0])
    for arguments in (kwargs, removed):
        out, lse, importance = target.call(tk.ragged_attention, **arguments)
        importance = importance[kept] if arguments is kwargs else importance
        actual = (out, lse, importance)
        for name, ours, exact, plain in zip(SPEC.outputs, actual, truth, yardstick, strict=True):
            assert_close_as_torch(ours, exact, plain, name=name, terms=terms.get(name))


@attention
@with_dtypes
def test_uniform_weights_cancel(target: Target, dtype: torch.dtype) -> None:
    """Any common weight leaves `out` alone and moves `lse` by its logarithm."""
    kwargs = cases.ragged_attention(Source(dtype, target.device), LENGTHS, spare=0)
    truth, yardstick = SPEC.oracle(kwargs, torch.float64), SPEC.oracle(kwargs, dtype)
    keep = torch.full((sum(LENGTHS),), 0.25, device=target.device)
    out, lse, _ = target.call(tk.ragged_attention, **{**kwargs, "keep": keep})
    assert_close_as_torch(out, truth[0], yardstick[0])
    assert_close_as_torch(lse, truth[1] + torch.tensor(0.25).double().log(), yardstick[1] - 1.3862943611198906)


@attention
def test_no_kept_key_at_all(target: Target) -> None:
    """All weights 0: nothing to attend to, out = 0, lse = -inf, no importance, no gradient, and no NaN anywhere."""
    target.require("ragged_attention_backward")
    kwargs = cases.ragged_attention(Source(torch.float32, target.device), (3, 20, 2), spare=0, importance=True)
    keep = torch.ones(25, device=target.device)
    keep[3:23] = 0
    kwargs["keep"] = keep
    leaves = [kwargs[name].detach().requires_grad_() for name in ("q", "k", "v", "keep")]
    kwargs.update(zip(("q", "k", "v", "keep"), leaves, strict=True))
    with target.only("ragged_attention", "ragged_attention_backward"):
        out, lse, importance = tk.ragged_attention(**kwargs, kernels=target.backend)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert out[3:23].count_nonzero() == importance[3:23].count_nonzero() == 0
    assert torch.equal(lse[:, 3:23], torch.full_like(lse[:, 3:23], -torch.inf))
    for grad in grads:
        assert grad[3:23].count_nonzero() == 0
        assert grad.isfinite().all()


@attention
def test_steep_skimmed_key_has_a_finite_gradient(target: Target) -> None:
    """A skimmed key outside the normaliser may have exp(S - lse) beyond fp32: clamped, not infinite."""
    target.require("ragged_attention_backward")
    kwargs = cases.ragged_attention(Source(torch.float32, target.device), (5,), spare=0, layout="dense")
    kwargs["k"][3] = 100 * kwargs["q"][2]
    keep = torch.tensor([1, 1, 0.5, 0, 1], device=target.device).requires_grad_()
    kwargs["keep"] = keep
    out, _, _ = tk.ragged_attention(**kwargs, kernels=target.backend)
    (grad,) = torch.autograd.grad(out.sum(), keep)
    assert grad.isfinite().all()
    assert grad[3] != 0


@attention
def test_nan_stays_in_its_sequence_and_is_not_hidden(target: Target) -> None:
    """A NaN key makes its whole sequence NaN, as in dense attention; a NaN query only its own row."""
    for middle, importance in ((65, True), (14, False)):
        count = 17 + middle + 3
        kwargs = cases.ragged_attention(Source(torch.float32, target.device), (17, middle, 3), importance=importance)
        for name, poisoned in (("k", slice(17, 17 + middle)), ("q", slice(20, 21)), ("v", slice(17, 17 + middle))):
            changed = kwargs[name].clone()
            changed[20] = torch.nan
            out, lse, _ = target.call(tk.ragged_attention, **{**kwargs, name: changed})
            expected = torch.zeros(count, dtype=torch.bool)
            expected[poisoned] = True
            assert torch.equal(out[:count].isnan().all((1, 2)).cpu(), expected)
            assert torch.equal(out[:count].isnan().any(2).any(1).cpu(), expected)
            if name != "v":
                assert torch.equal(lse[:, :count].isnan().all(0).cpu(), expected)


@attention
def test_a_head_beyond_the_kernels_is_refused(target: Target) -> None:
    """Triton's tiles hold whole heads, and `cuda` leaves them to Triton; the other backends take any size."""
    kwargs = cases.ragged_attention(Source(torch.float32, target.device), (3, 2), head_dim=160)
    if target.backend in ("triton", "cuda"):
        target.require("ragged_attention")
        with pytest.raises(ValueError, match=r"^q: the Triton kernels take a head_dim of at most 128, got 160$"):
            tk.ragged_attention(**kwargs, kernels=target.backend)
    else:
        out, _, _ = target.call(tk.ragged_attention, **kwargs)
        assert out[:5].isfinite().all()


def test_reference_takes_fp64() -> None:
    """It is the oracle of everything above the operators, so it must be as good as fp64 allows."""
    target = Target("reference", "cpu")
    kwargs = cases.ragged_attention(Source(torch.float64), LENGTHS, importance=True, keep="mixed")
    actual = oracle.valid("ragged_attention", kwargs, target.call(tk.ragged_attention, **kwargs))
    for ours, exact in zip(actual, SPEC.oracle(cast(kwargs, torch.float64), torch.float64), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
