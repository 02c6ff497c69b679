"""Runs every operator that our GPU backends serve, once per dtype, forwards and backwards: what the sanitizer watches.

Inputs are those of the conformance tests, garbage included, so that an access out of bounds has somewhere to go.
"""

from __future__ import annotations

import argparse

import torch

from tests.ops import cases, oracle
from tests.ops.cases import Case
from tests.ops.operators import CASES, SPECS, clone
from tests.target import DTYPES
from transkimmer_kernels.library import OPERATORS
from transkimmer_kernels.registry import why_not

LENGTHS = "awkward"
# What the first case of an operator leaves out (CUDA kernels that serve certain sizes only, for one), and the operator
# that the conformance tests treat apart.
MORE = [
    Case(cases.ragged_attention, LENGTHS, {"keep": "mixed"}),
    Case(cases.encoder_layer_, LENGTHS, {"width": 64, "heads": 2, "ff": 96, "first_only": True}),
    Case(cases.ragged_attention, LENGTHS, {"head_dim": 64, "importance": True}),
    Case(cases.skim_logit, LENGTHS, {"width": 384, "inner": 192}),
    Case(cases.skim_tokens, LENGTHS, {"width": 64, "inner": 32, "keep_first": True}),
    Case(cases.skim_tokens, LENGTHS, {"width": 384, "inner": 384, "keep_first": True}),
]


def chosen_cases() -> list[Case]:
    """The first case of every operator on the chosen lengths, and some more."""
    first: dict[str, Case] = {}
    for case in CASES:
        if case.lengths == LENGTHS and case.backends is None:
            first.setdefault(case.operator, case)
    return [*first.values(), *MORE]


def run(case: Case, backend: str, dtype: torch.dtype, device: str) -> None:
    """The operator, and its backward where it has one."""
    spec = SPECS[case.operator]
    kwargs = case.make(dtype, device)
    leaves = {name: kwargs[name].detach().requires_grad_() for name in spec.present_leaves(kwargs)}
    outputs = spec.function(**clone(kwargs | leaves), kernels=backend)
    if leaves:
        first = oracle.valid(spec.name, kwargs, outputs)[0]
        torch.autograd.grad(first, list(leaves.values()), torch.ones_like(first), allow_unused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda"])
    options = parser.parse_args()
    for backend in options.backends:
        for case in chosen_cases():
            if (reason := why_not(OPERATORS[case.operator], backend)) is not None:
                print(f"{backend} {case}: not run: {reason}")
                continue
            for dtype in DTYPES[backend]:
                run(case, backend, dtype, options.device)
            print(f"{backend} {case}: ran", flush=True)
    if options.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
