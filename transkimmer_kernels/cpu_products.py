"""Matrix products on the CPU: which form a weight is packed into, once, and so which kernel multiplies with it.

* `panels`: our own kernel (csrc/cpu/product.h), whose rate falls little down to about 50 rows;
* `onednn`: oneDNN, on its own layout (`onednn.py`);
* `plain`: PyTorch, on the matrix as it is.

The native operators take all three and tell them apart; `benchmarks/packing.py` measured which is best where. Packing
matters most where skimming leaves few rows: a product on a plain matrix re-lays all of it out at every call, a cost
that does not shrink with the tokens.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from . import onednn

FORMS = ("panels", "onednn", "plain")
# Takes the place of the measured choice, to measure another one.
_OVERRIDE = "TRANSKIMMER_CPU_PRODUCTS"
# (instruction set of our kernels, dtype) -> forms in order of preference. bf16 goes to oneDNN where the processor
# multiplies it natively, which is the only case in which oneDNN packs it. What is not listed has not been measured; nor
# have bf16 panels on avx512bf16.
_UNMEASURED = ("onednn", "plain")
_PREFERENCES = {
    ("avx2", torch.float32): ("panels",),
    ("avx2", torch.bfloat16): ("onednn", "panels"),
    ("avx512", torch.bfloat16): ("onednn", "panels"),
    ("avx512bf16", torch.bfloat16): ("onednn", "panels"),
}


def _offers(form: str, dtype: torch.dtype) -> bool:
    if form == "onednn":
        return onednn.can_pack(dtype)
    return form == "plain" or dtype in (torch.float32, torch.bfloat16)


def instruction_set() -> str:
    """Of our kernels; ValueError where TRANSKIMMER_CPU_ISA names one that is not there."""
    try:
        return str(torch.ops.transkimmer_cpu.isa())
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from error


@functools.cache
def choose_form(dtype: torch.dtype) -> str:
    """The form of a weight of `dtype` here: the best measured one, or what TRANSKIMMER_CPU_PRODUCTS names.

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
    forms = (*_PREFERENCES.get((isa, dtype), _UNMEASURED), "plain")
    return next(form for form in forms if _offers(form, dtype))


def pack_weight(weight: Tensor, form: str | None = None) -> Tensor:
    """A weight [out, in] in `form`, by default the best one here; as it is on other devices, or where it is empty."""
    if weight.device.type != "cpu" or weight.numel() == 0:
        return weight
    form = choose_form(weight.dtype) if form is None else form
    if form == "plain":
        return weight
    weight = weight.detach().contiguous()
    return onednn.pack_weight(weight) if form == "onednn" else torch.ops.transkimmer_cpu.pack_panels(weight)
