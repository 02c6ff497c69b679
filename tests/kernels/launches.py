"""Triton kernels' host code without a GPU: what would be launched goes to the test instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from triton.runtime.jit import JITFunction

from transkimmer_kernels.library import OPERATORS
from transkimmer_kernels.registry import kernel_set, select_backend


@contextmanager
def launches_go_to(run: Callable[..., None]) -> Iterator[None]:
    """Triton serves CPU tensors inside; `run(kernel, *args, grid, warmup, **kwargs)` gets the launches."""
    caches = (select_backend, kernel_set)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        for operator in OPERATORS.values():
            if "triton" in operator.backends:
                patch.setitem(operator.backends, "triton", lambda: None)
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()
