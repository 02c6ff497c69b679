"""`ragged_attention` against PyTorch's variable-length attention and against padded SDPA.

Ours gets what a captured forward gives it: the capacity and the longest length of the whole batch, whatever is left of
it. PyTorch's gets the exact ones, which a forward would have to read back first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.ops import cases

from .contenders import OURS, Contender, Problem, backend, first_rows, measure
from .roofline import Ceilings
from .sizes import DEVICE, DTYPE, HEADS, ON_GPU, WIDTH, WORKLOADS, Workload
from .timing import Call, Kwargs, clock


@functools.lru_cache(maxsize=1)
def problem(workload: Workload) -> Problem:
    lengths, longest = workload.lengths, max(workload.full)
    source = cases.Source(DTYPE, DEVICE)
    kwargs = cases.ragged_attention(source, lengths, heads=HEADS, head_dim=WIDTH // HEADS, spare=workload.spare)
    tokens = sum(lengths)
    return Problem(
        operator="ragged_attention",
        workload=str(workload),
        variant="forward",
        state="full" if workload.layer is None else "skimmed",
        kwargs={**kwargs, "max_seqlen_q": longest, "max_seqlen_k": longest},
        tokens=tokens,
        capacity=tokens + workload.spare,
        moved=4 * tokens * WIDTH * DTYPE.itemsize,  # q, k, v and the result
        flops=4 * WIDTH * sum(n * n for n in lengths),
    )


def varlen(lengths: tuple[int, ...]) -> Contender:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return Contender("varlen_attn", _never, first_rows, reason=str(error))
    tokens, longest = sum(lengths), max(lengths)

    def prepare(kwargs: Kwargs) -> Call:
        q, k, v = (kwargs[name][:tokens] for name in "qkv")
        offsets = kwargs["cu_seqlens_q"], kwargs["cu_seqlens_k"]
        return lambda: varlen_attn(q, k, v, *offsets, longest, longest)

    return Contender("varlen_attn", prepare, first_rows, reason=None if ON_GPU else "has no kernel for a CPU")


def padded_sdpa(lengths: tuple[int, ...]) -> Contender:
    """As Hugging Face calls it, on tensors that are padded already."""
    real = torch.arange(max(lengths), device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]

    def prepare(kwargs: Kwargs) -> Call:
        tokens = sum(lengths)
        q, k, v = (
            pad_sequence(kwargs[name][:tokens].split(list(lengths)), batch_first=True).transpose(1, 2).contiguous()
            for name in "qkv"
        )  # [B, H, L, D]
        mask = real[:, None, None, :]
        return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def valid(problem: Problem, result: Tensor) -> Tensor:
        return result.transpose(1, 2)[real]

    return Contender("sdpa_padded", prepare, valid)


def _never(kwargs: Kwargs) -> Call:
    """Stands in for `prepare` where a contender is absent, with the reason in its row; nobody calls it."""
    raise AssertionError("an absent contender was prepared")


def _ours(name: str) -> Callable[[tuple[int, ...]], Contender]:
    return lambda lengths: backend("ragged_attention", name)


CONTENDERS: dict[str, Callable[[tuple[int, ...]], Contender]] = {
    **{name: _ours(name) for name in OURS},
    "varlen_attn": varlen,
    "sdpa_padded": padded_sdpa,
}


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_attention(benchmark: BenchmarkFixture, workload: Workload, contender: str, ceilings: Ceilings) -> None:
    measure(benchmark, problem(workload), CONTENDERS[contender](workload.lengths), ceilings)
