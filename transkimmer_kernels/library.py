"""Defines operators: one schema per operator, one overload per backend.

`torch.ops.transkimmer.compact.reference` and `torch.ops.transkimmer.compact.cpu` are two overloads of one schema. A
backend is therefore chosen by naming an overload: no string argument travels through the dispatcher, `torch.compile`
sees a concrete operator, and `torch.library.opcheck` tests each backend by itself.

Schemas, fakes, autograd and FLOP formulas are written here once per operator; a backend supplies an implementation,
either a Python function (`implement`) or a kernel registered by one of the native libraries (`implement_natively`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import native

NAMESPACE = "transkimmer"
BACKENDS = ("reference", "cpu", "triton", "cuda")

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclass
class Operator:
    """One operator: its schema, the formulas every backend shares, and who implements it."""

    name: str
    schema: str
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None = None
    make_backward: Callable[[str], Callable[..., Any]] | None = None
    flops: Callable[..., int] | None = None
    # backend -> a function that answers None when the backend works here, else the reason why it does not
    backends: dict[str, Callable[[], str | None]] = field(default_factory=dict)

    @property
    def packet(self) -> torch._ops.OpOverloadPacket:
        return getattr(torch.ops.transkimmer, self.name)

    def overload(self, backend: str) -> torch._ops.OpOverload:
        return getattr(self.packet, backend)


OPERATORS: dict[str, Operator] = {}


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    make_backward: Callable[[str], Callable[..., Any]] | None = None,
    flops: Callable[..., int] | None = None,
) -> Operator:
    """Declares an operator.

    Args:
        make_backward: `make_backward(backend)` returns the autograd formula for that backend's overload.
        flops: the operator's arguments -> its FLOPs (`ops/counting.py`), for `torch.utils.flop_counter`, whatever the
            backend; None: it multiplies no matrices.
    """
    OPERATORS[name] = Operator(name, schema, fake, setup_context, make_backward, flops)
    return OPERATORS[name]


def _declare(operator: Operator, backend: str, available: Callable[[], str | None]) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    overload = f"{operator.name}.{backend}"
    qualified = f"{NAMESPACE}::{overload}"
    _LIBRARY.define(overload + operator.schema)
    torch.library.register_fake(qualified, operator.fake, lib=_LIBRARY)
    if operator.make_backward is not None:
        backward = _once_differentiable(operator.make_backward(backend))
        torch.library.register_autograd(qualified, backward, setup_context=operator.setup_context, lib=_LIBRARY)
    for key in (torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA):
        _LIBRARY.impl(overload, _without_autocast(operator, backend, key), key.name)
    operator.backends[backend] = available
    return overload


def _once_differentiable(formula: Callable[..., Any]) -> Callable[..., Any]:
    """A second derivative is an error instead of a part of the truth: the formulas differentiate no further.

    torch's own decorator lets it be zero where only what was saved, and not the incoming gradient, depends on a leaf.
    """

    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            outputs = formula(ctx, *grads)
        if not torch.is_grad_enabled():  # no create_graph
            return outputs
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        message = b"transkimmer's operators are differentiable once; create_graph=True cannot go through them"
        fail = torch._C._functions.DelayedError(message, len(outputs))
        return fail(*(x if x is None else x.detach().requires_grad_() for x in outputs))  # type: ignore[arg-type]

    return backward


def _without_autocast(operator: Operator, backend: str, key: torch._C.DispatchKey) -> Callable[..., Any]:
    """An operator computes in its operands' dtype: autocast inside it would round intermediate results."""
    autocast = torch._C.DispatchKeySet(key)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operator.overload(backend)(*args, **kwargs)

    return run


def _register_flops(packet: torch._ops.OpOverloadPacket, flops: Callable[..., int]) -> None:
    @register_flop_formula(packet, get_raw=True)
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return flops(*args, **kwargs)


def implement(
    name: str, backend: str, *, available: Callable[[], str | None] = lambda: None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: this Python function is `backend`'s implementation of operator `name`.

    Registered for every device: weights that a backend has packed carry dispatch keys of their own, and which device a
    backend serves is the registry's business.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        overload = _declare(OPERATORS[name], backend, available)
        _LIBRARY.impl(overload, function, "CompositeExplicitAutograd")
        return function

    return register


def needs_library(name: str) -> Callable[[], str | None]:
    """Availability of whatever stands on the native library `name` ("cpu" or "cuda")."""
    return lambda: native.why_not(name)


def implement_natively(name: str, backend: str) -> None:
    """Declares that native library `backend` registers its kernel for operator `name` when it is loaded."""
    loaded = needs_library(backend)

    def available() -> str | None:
        kernel = f"{NAMESPACE}::{name}.{backend}"
        if (reason := loaded()) is not None:
            return reason
        keys = (backend.upper(), "CompositeExplicitAutograd")
        if not any(torch._C._dispatch_has_kernel_for_dispatch_key(kernel, key) for key in keys):
            return f"{native.status()[backend].path.name} has no kernel for it: rebuild the package"
        return None

    _declare(OPERATORS[name], backend, available)


def needs_kernel(kernel: str, general: str, beyond: str) -> Callable[[], str | None]:
    """Availability of a choice, in Python, between a native kernel and Triton's implementation of the operator.

    kernel: the native one, "transkimmer_cuda::short_attention"; general: the operator; beyond: what is Triton's.
    """
    namespace, _, name = kernel.partition("::")
    library = namespace.removeprefix(f"{NAMESPACE}_")

    def available() -> str | None:
        if (reason := native.why_not(library)) is not None:
            return reason
        if not torch._C._dispatch_has_kernel(kernel):
            return f"{native.status()[library].path.name} has no {name}: rebuild the package"
        triton = OPERATORS[general].backends.get("triton")
        reason = f"no triton kernel for {general}" if triton is None else triton()
        return reason and f"{beyond} needs Triton: {reason}"

    return available


def load_operators(package: str, names: tuple[str, ...]) -> None:
    """Imports every operator's package and, inside it, whichever backend files exist."""
    for name in names:
        importlib.import_module(f"{package}.{name}")
        for backend in BACKENDS:
            module = f"{package}.{name}.{backend}"
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                # A missing backend file is a backend that does not serve this operator; of a missing Triton the
                # registry says so.
                if error.name not in (module, "triton"):
                    raise
    # Only now: every overload that is declared changes the hash of its operator, by which a formula is found.
    for operator in OPERATORS.values():
        if operator.flops is not None:
            _register_flops(operator.packet, operator.flops)
