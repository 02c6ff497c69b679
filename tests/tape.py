"""An engine for `GraphCache` on a CPU, as strict as a CUDA graph: what Python decided while recording stays decided.

A capture records the operators that ran, with their arguments. A replay runs them again, without the Python around
them, and writes each result where the first one lies. Between replays all that they wrote is garbage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique_consecutive")


def read_by(func: Any, args: tuple[Any, ...]) -> str | None:
    """The name of an operator that a device would have to be waited for, None for any other."""
    name: str = func._schema.name.partition("::")[2]
    by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
    return name if name in READS or by_mask else None


class Tape(TorchDispatchMode):
    """What ran, as one step per operator, and the tensors that did not exist before."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.written: list[Tensor] = []
        self.outputs: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (name := read_by(func, args)) is not None:
            raise RuntimeError(f"{name} reads from the device, which cannot be captured")
        known = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **kwargs)
        fresh = [x for x in tree_leaves(result) if isinstance(x, Tensor) and _storage(x) not in known]
        self.steps.append((func, args, kwargs, [x for x in tree_leaves(result) if isinstance(x, Tensor)]))
        self.written += fresh
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        fresh = {id(x) for x in self.written}
        for func, args, kwargs, results in self.steps:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for old, new in zip(results, again, strict=True):
                assert old.shape == new.shape, f"{func}: the shape depends on values"
                if id(old) in fresh:
                    old.copy_(new)

    @torch.inference_mode()
    def poison(self) -> None:
        for x in self.written:
            x.fill_(torch.nan if x.is_floating_point() else x.dtype == torch.bool or torch.iinfo(x.dtype).max)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class TapeEngine:
    """Tapes that share their memory in the worst way: a replay of one leaves garbage in all others."""

    WARM_UPS = 1

    def __init__(self, device: torch.device) -> None:
        self._tapes: list[Tape] = []
        self._busy = threading.Lock()
        self.stale = False

    def warm_up(self, run: Callable[[], object]) -> None:
        for _ in range(self.WARM_UPS):
            run()

    def record(self, run: Callable[[], dict[str, Tensor]]) -> Tape:
        tape = Tape()
        with tape:
            tape.outputs = run()
        self._tapes.append(tape)
        self.recorded(tape)
        return tape

    def recorded(self, tape: Tape) -> None:
        """A capture computes nothing: there are no values yet."""
        tape.poison()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        assert self._busy.acquire(blocking=False), "two replays at once"
        try:
            yield
        finally:
            for tape in self._tapes:
                tape.poison()
            self._busy.release()

    def wait(self) -> None:
        assert not self._busy.locked(), "buffers are freed while they are in use"

    def is_stale(self) -> bool:
        return self.stale

    def bytes_held(self) -> int:
        return sum(x.nbytes for tape in self._tapes for x in tape.written)
