"""Matrix products on the CPU: which form a weight is packed into, once, and so which kernel multiplies with it.

* `panels`: our own kernel (csrc/cpu/product.h), whose rate falls little down to about 50 rows;
* `onednn`: oneDNN, on its own layout (`onednn.py`);
* `plain`: PyTorch, on the matrix as it is.

The native operators take all three and tell them apart. Which is best was measured on some instruction sets
(docs/design.md); on the others the forms are timed once per process. Packing matters most where skimming leaves few
rows: a product on a plain matrix re-lays all of it out at every call, a cost that does not shrink with the tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import onednn

FORMS = ("panels", "onednn", "plain")
# Takes the place of the measured choice, to measure another one.
_OVERRIDE = "TRANSKIMMER_CPU_PRODUCTS"
# (instruction set of our kernels, dtype) -> forms in order of preference, where it was measured.
_MEASURED = {
    ("avx2", torch.float32): ("panels",),
    ("avx2", torch.bfloat16): ("onednn", "panels"),
    ("avx512bf16", torch.float32): ("panels",),
    ("avx512bf16", torch.bfloat16): ("panels",),
}
# What `faster_form` times: few rows and many, and as many weights of this width as do not stay in a cache, since in a
# model those of the other layers have passed through it in between.
_ROWS, _WIDTH, _WEIGHTS, _ROUNDS = (56, 200), 768, 8, 3


def _offers(form: str, dtype: torch.dtype) -> bool:
    if form == "onednn":
        return onednn.can_pack(dtype)
    return form == "plain" or dtype in (torch.float32, torch.bfloat16)


def instruction_set() -> str:
    """The instruction set of our kernels; ValueError where TRANSKIMMER_CPU_ISA names one that is not there."""
    try:
        return str(torch.ops.transkimmer_cpu.isa())
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from error


@functools.cache
def choose_form(dtype: torch.dtype) -> str:
    """The form of a weight of `dtype` here: the fastest one, or what TRANSKIMMER_CPU_PRODUCTS names.

    Raises:
        ValueError: that variable, or TRANSKIMMER_CPU_ISA, names something that does not exist or is not there.
    """
    isa = instruction_set()
    if override := os.environ.get(_OVERRIDE, ""):
        if override not in FORMS:
            raise ValueError(f"{_OVERRIDE}={override!r}: must be one of {', '.join(FORMS)}")
        if not _offers(override, dtype):
            there = ", ".join(form for form in FORMS if _offers(form, dtype))
            raise ValueError(f"{_OVERRIDE}={override!r}: not for {dtype} on this machine; there is {there}")
        return override
    measured = _MEASURED.get((isa, dtype))
    offered = [form for form in measured or FORMS if _offers(form, dtype)] or ["plain"]
    return offered[0] if measured or len(offered) == 1 else faster_form(dtype, offered)


def faster_form(dtype: torch.dtype, forms: Sequence[str]) -> str:
    """The form of `forms` in which products took the least time, on this machine and with its threads, just now.

    Takes some tenths of a second. The forms take turns, and each counts with its best round, so that what else the
    machine does in between decides little.
    """
    best = dict.fromkeys(forms, math.inf)
    with torch.inference_mode():
        rounds = {form: _products(dtype, form) for form in forms}
        for _, form in itertools.product(range(_ROUNDS), forms):
            start = time.perf_counter()
            rounds[form]()
            best[form] = min(best[form], time.perf_counter() - start)
    return min(forms, key=lambda form: best[form])


def _products(dtype: torch.dtype, form: str) -> Callable[[], None]:
    """A round of products of each of `_ROWS` with each of `_WEIGHTS` weights; run once, so that oneDNN is compiled."""
    weights = [pack_weight(torch.ones(_WIDTH, _WIDTH, dtype=dtype), form) for _ in range(_WEIGHTS)]
    bias = torch.zeros(_WIDTH, dtype=dtype)
    inputs = [(torch.ones(rows, _WIDTH, dtype=dtype), torch.tensor([0, rows], dtype=torch.int32)) for rows in _ROWS]

    def run() -> None:
        for (x, cu_seqlens), weight in itertools.product(inputs, weights):
            torch.ops.transkimmer.ragged_linear.cpu(x, weight, bias, cu_seqlens, None, "none")

    run()
    return run


def pack_weight(weight: Tensor, form: str | None = None) -> Tensor:
    """A weight [out, in] in `form`, by default the best one here; as it is on other devices, or where it is empty."""
    if weight.device.type != "cpu" or weight.numel() == 0:
        return weight
    form = choose_form(weight.dtype) if form is None else form
    if form == "plain":
        return weight
    weight = weight.detach().contiguous()
    return onednn.pack_weight(weight) if form == "onednn" else torch.ops.transkimmer_cpu.pack_panels(weight)
