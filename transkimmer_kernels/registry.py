"""Which backend serves which operator on which device, and why another one does not.

A choice of `kernels` is a preference list of backends, tried per operator:

| `kernels`   | CPU tensors        | CUDA tensors              |
|-------------|--------------------|---------------------------|
| `auto`      | cpu, reference     | cuda, triton, reference   |
| `cpu`       | cpu                | refused                   |
| `triton`    | triton             | triton                    |
| `cuda`      | refused            | cuda, triton              |
| `reference` | reference          | reference                 |

The environment variable TRANSKIMMER_KERNELS says what `auto` means instead: one of the other choices.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cpu_products import pack_weight
from .library import BACKENDS, OPERATORS, Operator
from .triton_support import why_not_importable

KERNELS = ("auto", *BACKENDS)

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
    if check_kernels(kernels) == "auto":
        kernels = check_kernels(os.environ.get("TRANSKIMMER_KERNELS", kernels), "TRANSKIMMER_KERNELS")
    preferences = _PREFERENCES[kernels]
    if preferences and device_type not in preferences and kernels != "auto":
        raise BackendUnavailable(
            f"kernels={kernels!r} does not serve tensors on {device_type!r}: move the model, or choose kernels='auto'"
        )
    reasons = []
    for backend in preferences.get(device_type, ("reference",)):
        reason = why_not(OPERATORS[name], backend)
        dtypes = _DTYPES[backend]
        if reason is None and dtypes is not None and dtype not in dtypes:
            reason = f"computes in {', '.join(map(str, dtypes))}, not in {dtype}"
        if reason is None:
            return backend
        reasons.append(f"{backend}: {reason}")
    raise BackendUnavailable(f"kernels={kernels!r} cannot run {name} on {device_type!r} here ({'; '.join(reasons)})")


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
        for name, backend in self.serves.items():
            setattr(self, name, OPERATORS[name].overload(backend))

    def __getattr__(self, name: str) -> Callable[..., Any]:  # for type checkers: operators are set in __init__
        raise AttributeError(f"no operator {name!r}; operators are {', '.join(OPERATORS)}")

    def pack_weight(self, weight: Tensor) -> Tensor:
        """A matrix in the form these kernels multiply fastest with; safe to cache while the weight does not change."""
        return pack_weight(weight) if self.serves["ragged_linear"] == "cpu" else weight


@functools.cache
def kernel_set(kernels: str, device_type: str, dtype: torch.dtype = torch.float32) -> KernelSet:
    """The `KernelSet` of a choice; BackendUnavailable, with the reason, where it cannot serve."""
    return KernelSet(kernels, device_type, dtype)


def table() -> list[tuple[str, dict[str, str]]]:
    """(operator, {backend: "available" or why not}) for the environment report."""
    return [
        (operator.name, {backend: why_not(operator, backend) or "available" for backend in BACKENDS})
        for operator in OPERATORS.values()
    ]
