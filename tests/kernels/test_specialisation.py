"""Row counts, batch sizes and capacities compile no kernel anew: Triton finds the one that is there.

Triton's own binder is asked what it would look a compiled kernel up by; nothing is compiled or launched, and no GPU is
needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from transkimmer_kernels import aot, triton_support
from transkimmer_kernels.library import OPERATORS

from ..ops import cases
from ..ops.cases import Source
from ..ops.operators import SPECS

if (REASON := triton_support.why_not_importable()) is not None:
    pytest.skip(REASON, allow_module_level=True)
if triton_support.interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from .launches import launches_go_to

# One row and none, numbers that 16 divides and others, one tile and many, few sequences and many.
BATCHES = ((7000, 3), (1,), (16,) * 16, (17, 0, 5), (0, 0), (2048,), (1,) * 333, (4096, 64))
CASES: dict[str, Callable[[Source, Any], dict[str, Any]]] = {
    "compact": lambda s, n: cases.compact(s, n, probability=0.5, keep_first=True),
    "gather_rows": lambda s, n: cases.gather_rows(s, n, shape=(64,)),
    "scatter_rows": lambda s, n: cases.scatter_rows(s, n, shape=(64,)),
    "skim_logit": lambda s, n: cases.skim_logit(s, n, width=64, inner=32),
    "skim_tokens": lambda s, n: cases.skim_tokens(s, n, width=64, inner=512, keep_first=True),
    "ragged_attention": lambda s, n: cases.ragged_attention(s, n, keep="mixed", importance=True, spare=s.spare),
    "ragged_linear": lambda s, n: cases.ragged_linear(s, n, width=64, out=96, activation="gelu"),
    "ragged_linear_norm": lambda s, n: cases.ragged_linear_norm(s, n, width=64, out=64),
    "ragged_linear_norm_": lambda s, n: cases.ragged_linear_norm_(s, n, width=64, out=64),
    "encoder_layer_": lambda s, n: cases.encoder_layer_(s, n, width=64, heads=2, ff=96),
    "embed_tokens": lambda s, n: cases.embed_tokens(s, n, width=64),
    "add_norm": lambda s, n: cases.add_norm(s, n, width=64),
    "choose_rows": lambda s, n: cases.choose_rows(s, n, width=64),
}

Keys = dict[str, set[str]]


@pytest.fixture
def keys() -> Iterator[Keys]:
    """Kernel -> what its launches would be looked up by, for sm_90; launches do nothing else."""
    found: Keys = defaultdict(set)
    backend = make_backend(GPUTarget("cuda", 90, 32))

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialisation, options = bind(*args, **kwargs)
        found[kernel.__name__].add(f"{specialisation} {options}")

    with launches_go_to(run):
        yield found


def _launch(operator: str, lengths: tuple[int, ...], spare: int) -> None:
    """Forwards and, where there is one, backwards; what comes out is whatever lay in memory."""
    spec = SPECS[operator]
    kwargs = CASES[operator](Source(torch.bfloat16, spare=spare), lengths)
    leaves = {name: kwargs[name].detach().requires_grad_() for name in spec.present_leaves(kwargs)}
    outputs = spec.function(**kwargs | leaves, kernels="triton")
    if leaves:
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        torch.autograd.grad(first, list(leaves.values()), torch.ones_like(first), allow_unused=True)


@pytest.mark.parametrize("operator", CASES)
def test_one_compiled_kernel_serves_every_batch(operator: str, keys: Keys) -> None:
    needed = PARTS.get(operator, (operator, *SPECS[operator].backward))
    if missing := [name for name in needed if "triton" not in OPERATORS[name].backends]:
        pytest.skip(f"no triton kernel for {', '.join(missing)}")
    for lengths in BATCHES[:2]:  # with long sequences, the sums of attention's columns are a kernel of their own
        _launch(operator, lengths, 16)
    first = {kernel: set(found) for kernel, found in keys.items()}
    assert first
    assert set(first) <= {entry.kernel.__name__ for _, entry in aot.kernels()}, "not compiled ahead of time"
    for lengths in BATCHES[2:]:
        for spare in (0, 5, 16):
            _launch(operator, lengths, spare)
            for kernel, found in keys.items():
                assert found == first[kernel], f"{kernel} would be compiled anew for {lengths[:4]}, capacity + {spare}"


PARTS = {"encoder_layer_": ("ragged_linear", "ragged_attention", "ragged_linear_norm", "ragged_linear_norm_")}


def test_every_operator_is_among_them() -> None:
    assert set(CASES) == set(SPECS)


def test_a_count_that_specialises_would_be_seen(keys: Keys) -> None:
    @triton.jit
    def careless(p_x, count):
        pass

    x = torch.zeros(4)
    for count in (5, 7, 16, 32, 1):
        careless[(1,)](x, count)
    assert len(keys["careless"]) == 3  # odd, divisible by 16, and 1
