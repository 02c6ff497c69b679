"""Which backend serves which operator on which device, and why another one does not.

A choice of `kernels` is a preference list of backends, tried per operator:

| `kernels`   | CPU tensors        | CUDA tensors              |
|-------------|--------------------|---------------------------|
| `auto`      | cpu, reference     | cuda, triton, reference   |
| `cpu`       | cpu                | refused                   |
| `triton`    | triton             | triton                    |
| `cuda`      | refused            | cuda, triton              |
| `reference` | reference          | reference                 |

The environment variable TRANSKIMMER_KERNELS says what `auto` means instead: one of the other choices. A library that
TRANSKIMMER_LIBRARY names and that cannot be loaded is an error where its backend would be next.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import native
from .cpu_products import choose_form, pack_weight
from .library import BACKENDS, OPERATORS, Operator
from .triton_support import why_not_importable

KERNELS = ("auto", *BACKENDS)
AUTO = "TRANSKIMMER_KERNELS"

_PREFERENCES: dict[str, dict[str, tuple[str, ...]]] = {
    "auto": {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")},
    "cpu": {"cpu": ("cpu",)},
    "triton": {"cpu": ("triton",), "cuda": ("triton",)},
    "cuda": {"cuda": ("cuda", "triton")},
    "reference": {},
}


# What a backend computes in; None: every floating type.
_DTYPES: dict[str, tuple[torch.dtype, ...] | None] = {
    "reference": None,
    "cpu": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


class BackendUnavailable(RuntimeError):
    """The chosen kernels cannot serve an operator on this machine or device; the message says why."""


def check_kernels(kernels: str, name: str = "kernels") -> str:
    if kernels not in KERNELS:
        raise ValueError(f"{name}={kernels!r}: must be one of {', '.join(KERNELS)}")
    return kernels


def why_not(operator: Operator, backend: str) -> str | None:
    """None if `backend` serves `operator` here, else the reason why it does not."""
    if (available := operator.backends.get(backend)) is not None:
        return available()
    missing = why_not_importable() if backend == "triton" else None
    return missing or f"no {backend} kernel for {operator.name}"


@functools.cache
def select_backend(name: str, kernels: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that serves operator `name` for tensors of `dtype` on `device_type` under the choice `kernels`."""
    choice, remedy = f"kernels={kernels!r}", "choose kernels='auto'"
    if check_kernels(kernels) == "auto" and (named := os.environ.get(AUTO)):
        kernels = check_kernels(named, AUTO)
        choice, remedy = f"{AUTO}={named!r} (what kernels='auto' means)", f"unset {AUTO}"
    preferences = _PREFERENCES[kernels]
    if preferences and device_type not in preferences and kernels != "auto":
        raise BackendUnavailable(f"{choice} does not serve tensors on {device_type!r}: move the model, or {remedy}")
    reasons = []
    for backend in preferences.get(device_type, ("reference",)):
        reason = why_not(OPERATORS[name], backend)
        dtypes = _DTYPES[backend]
        if reason is None and dtypes is not None and dtype not in dtypes:
            reason = f"computes in {', '.join(map(str, dtypes))}, not in {dtype}"
        if reason is None:
            return backend
        if (in_vain := native.named_in_vain(backend)) is not None:
            raise BackendUnavailable(f"{choice} cannot run {name}: {in_vain}; unset TRANSKIMMER_LIBRARY, or mend it")
        reasons.append(f"{backend}: {reason}")
    raise BackendUnavailable(f"{choice} cannot run {name} on {device_type!r} here ({'; '.join(reasons)})")


def select(name: str, kernels: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    """The overload that serves operator `name`."""
    return OPERATORS[name].overload(select_backend(name, kernels, device.type, dtype))


class KernelSet:
    """Every operator's overload for one choice of kernels, kind of device and dtype, resolved once.

    Attributes are the operators (`kernels.compact(...)`, raw schemas, no argument checks); `serves` maps operator to
    backend.
    """

    def __init__(self, kernels: str, device_type: str, dtype: torch.dtype = torch.float32) -> None:
        self.choice = check_kernels(kernels)
        self.device_type = device_type
        self.serves = {name: select_backend(name, kernels, device_type, dtype) for name in OPERATORS}
        if self.serves["ragged_linear"] == "cpu":
            choose_form(dtype)  # here, so that a bad setting does not wait for the first forward
        for name, backend in self.serves.items():
            setattr(self, name, OPERATORS[name].overload(backend))

    def __getattr__(self, name: str) -> Callable[..., Any]:  # for type checkers: operators are set in __init__
        raise AttributeError(f"no operator {name!r}; operators are {', '.join(OPERATORS)}")

    def pack_weight(self, weight: Tensor) -> Tensor:
        """A matrix in the form these kernels multiply fastest with; safe to cache while the weight does not change."""
        return pack_weight(weight) if self.serves["ragged_linear"] == "cpu" else weight


@functools.cache
def kernel_set(kernels: str, device_type: str, dtype: torch.dtype = torch.float32) -> KernelSet:
    """The `KernelSet` of a choice.

    Raises:
        BackendUnavailable: it cannot serve here; the message says why.
        ValueError: `kernels`, or an environment variable (docs/building.md), has a value that is not allowed.
    """
    return KernelSet(kernels, device_type, dtype)


def table() -> list[tuple[str, dict[str, str]]]:
    """(operator, {backend: "available" or why not}) for the environment report."""
    return [
        (operator.name, {backend: why_not(operator, backend) or "available" for backend in BACKENDS})
        for operator in OPERATORS.values()
    ]
