"""`embed_tokens` where a batch is not as it should be, or not laid out as usual."""

from __future__ import annotations

import pytest
import torch

import transkimmer_kernels as tk
from transkimmer_kernels.library import OPERATORS

from ..target import Target, poisoned_allocations
from . import oracle
from .cases import Kwargs, Source, embed_tokens

pytestmark = pytest.mark.operators("embed_tokens")
IDS = ("input_ids", "position_ids", "token_type_ids")


def _kwargs(target: Target) -> Kwargs:
    return embed_tokens(Source(torch.float32, target.device), (5, 3), width=48)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("value", [-1, 2**31 - 1, -(2**40)])
def test_an_id_out_of_range_is_refused_or_spoils_its_own_row(target: Target, name: str, value: int) -> None:
    """Past the checks of the public function, which looks at ids on a CPU only."""
    kwargs = _kwargs(target)
    clean = oracle.embed_tokens(**kwargs)[0]
    kwargs[name][1, 2] = value
    run = OPERATORS["embed_tokens"].overload(target.backend)
    if target.backend == "cpu":
        with pytest.raises(RuntimeError, match=rf"{name}\[1, 2\] is {value}; it must lie in \[0, \d+\)"):
            run(*kwargs.values(), 1e-12)
        return
    if target.backend != "triton":
        pytest.skip(f"{target}: PyTorch's embedding refuses such an id")
    with poisoned_allocations(target.device):
        out = run(*kwargs.values(), 1e-12)
    assert out[1, 2].isnan().all()
    out[1, 2] = clean[1, 2]
    torch.testing.assert_close(out, clean)


@pytest.mark.parametrize("name", ["word_weight", "position_weight", "type_weight", "norm_weight", "norm_bias"])
def test_a_gradient_is_refused(target: Target, name: str) -> None:
    kwargs = _kwargs(target)
    kwargs[name].requires_grad_()
    with pytest.raises(RuntimeError, match=r"^embed_tokens: not differentiable; use PyTorch's .*, or no_grad$"):
        tk.embed_tokens(**kwargs, kernels=target.backend)
    assert not target.call(tk.embed_tokens, **kwargs).requires_grad


def test_views_are_taken_by_value(target: Target) -> None:
    """Ids cut out of a longer buffer, one row repeated for all, and a table that is every other row of another."""
    kwargs = _kwargs(target)
    expected = target.call(tk.embed_tokens, **kwargs)
    wide = torch.full((2, 9), 10**6, device=target.device)
    wide[:, 2:7] = kwargs["input_ids"]
    table = torch.stack([kwargs["word_weight"], torch.full_like(kwargs["word_weight"], torch.nan)], 1).flatten(0, 1)
    cut = kwargs | {"input_ids": wide[:, 2:7], "word_weight": table[::2]}
    assert torch.equal(target.call(tk.embed_tokens, **cut), expected)

    shared = {"position_ids": kwargs["position_ids"][:1], "token_type_ids": kwargs["token_type_ids"][:1]}
    repeated = {name: ids.expand(2, -1) for name, ids in shared.items()}
    alike = [target.call(tk.embed_tokens, **(kwargs | ids)) for ids in (shared, repeated)]
    assert torch.equal(*alike)
    assert not torch.equal(alike[0], expected)
