"""Where a test runs: one backend on one device, with proof that this backend, and no other, did the work."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import transkimmer_kernels  # noqa: F401  (defines the operators)
from transkimmer_kernels import triton_support
from transkimmer_kernels.library import BACKENDS, NAMESPACE, OPERATORS
from transkimmer_kernels.registry import why_not

# Devices each backend serves; a backend that has none here is listed with the last one, and skipped with the reason.
DEVICES = {"reference": ("cpu", "cuda"), "cpu": ("cpu",), "triton": ("cpu", "cuda"), "cuda": ("cuda",)}
# Backends that leave operators to others by design: without a kernel, a test is skipped even where they are required.
PARTIAL = ("cuda",)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The CUDA kernels stepped through on the host: needs csrc/tests/emulated, which `make test` builds.
EMULATION = "emulation"
# The native CPU kernels have no fp16 arithmetic to offer and say so.
DTYPES = {backend: FLOATS if backend != "cpu" else FLOATS[:2] for backend in BACKENDS}


def required_backends() -> set[str]:
    """Backends whose tests must not be skipped: TRANSKIMMER_REQUIRE_BACKENDS, a list separated by commas."""
    names = {name.strip() for name in os.environ.get("TRANSKIMMER_REQUIRE_BACKENDS", "").split(",")} - {""}
    known = (*BACKENDS, EMULATION)
    if unknown := names - set(known):
        raise pytest.UsageError(f"TRANSKIMMER_REQUIRE_BACKENDS: unknown {sorted(unknown)}, known: {known}")
    return names


def skip(backend: str, reason: str) -> None:
    """Skips the running test with the registry's reason, or fails it where the backend is required."""
    if backend in required_backends():
        pytest.fail(f"{backend} is required by TRANSKIMMER_REQUIRE_BACKENDS, but: {reason}")
    pytest.skip(f"{backend}: {reason}")


class Recorder(TorchDispatchMode):
    """Notes every overload of ours that the dispatcher runs, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str, tuple[Any, ...]]] = []  # (operator, backend, raw arguments)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            name = func._schema.name.partition("::")[2]
            self.calls.append((name, func._overloadname, args))
        return func(*args, **(kwargs or {}))

    def arguments(self, operator: str) -> tuple[Any, ...]:
        """Raw arguments of the latest call of `operator`."""
        return next(args for name, _, args in reversed(self.calls) if name == operator)


@contextmanager
def poisoned_allocations(device: str) -> Iterator[None]:
    """Fresh tensors start as NaN (integers: the largest), so that an element that was not written is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # On a GPU there are operators without a deterministic form that the tests' own formulas need.
        warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=device != "cpu")
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclass(frozen=True)
class Target:
    backend: str
    device: str

    def __str__(self) -> str:
        return self.backend if len(DEVICES[self.backend]) == 1 else f"{self.backend}_{self.device}"

    def require(self, *operators: str) -> None:
        """Skips (or fails, see `skip`) unless this backend serves all these operators here."""
        for name in operators:
            if (reason := why_not(OPERATORS[name], self.backend)) is None:
                continue
            if self.backend in PARTIAL and self.backend not in OPERATORS[name].backends:
                pytest.skip(f"{self.backend}: {reason}")
            skip(self.backend, reason)
        if self.device == "cuda" and not torch.cuda.is_available():
            skip(self.backend, "torch sees no CUDA device")

    @contextmanager
    def only(self, *operators: str) -> Iterator[Recorder]:
        """Inside, exactly these operators must run, in this backend's overload, on poisoned allocations."""
        self.require(*operators)
        with poisoned_allocations(self.device), Recorder() as ran:
            yield ran
        wanted = {(name, self.backend) for name in operators}
        assert {(name, backend) for name, backend, _ in ran.calls} == wanted

    def call(self, function: Callable[..., Any], **kwargs: Any) -> Any:
        """A public function, through this backend and no other; undifferentiated inputs only."""
        with self.only(function.__name__), torch.no_grad():
            return function(**kwargs, kernels=self.backend)


def _targets() -> list[Target]:
    targets = []
    for backend in BACKENDS:
        usable = {"cuda": torch.cuda.is_available(), "cpu": backend != "triton" or triton_support.interpreted()}
        devices = [device for device in DEVICES[backend] if usable[device]]
        targets += [Target(backend, device) for device in devices or DEVICES[backend][-1:]]
    return targets


TARGETS = _targets()
