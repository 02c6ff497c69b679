"""Captured forwards: a function of fixed buffers, recorded once per size and replayed on new contents.

A replay is one launch, however many kernels it holds, and the host does nothing in between. What makes that possible is
that nothing in a forward depends on a value on the device: lengths and masks are contents of buffers, not shapes.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class StaticCall(Protocol):
    """A function of buffers that stay where they are."""

    nbytes: int  # of the buffers

    def load(self, request: Any) -> None:
        """Copies a request into the buffers; the host waits for nothing."""

    def run(self) -> Tensors:
        """The function of what the buffers hold. Reads nothing back to the host."""

    def result(self, outputs: Tensors, request: Any) -> Any:
        """What the request asked for, copied out of the outputs."""


class Captured(Protocol):
    """A recorded function: `replay` computes the tensors `outputs` anew, where they are."""

    outputs: Tensors

    def replay(self) -> None: ...


class Engine(Protocol):
    """Records functions. What one engine recorded shares memory: only one of them may run at a time."""

    def warm_up(self, run: Callable[[], object]) -> None:
        """Runs the function where it will be recorded, so that nothing is compiled or made for the first time there."""

    def record(self, run: Callable[[], Tensors]) -> Captured:
        """Where it raises, the engine and all that it recorded are to be dropped."""

    def exclusive(self) -> AbstractContextManager[None]:
        """Work enqueued inside comes after that of earlier blocks, whatever stream and thread they were on."""

    def wait(self) -> None:
        """Until the last block's work is done."""

    def bytes_held(self) -> int:
        """Memory that everything recorded takes, outputs included."""

    def is_stale(self) -> bool:
        """Whether nothing that it recorded may be replayed any more."""


class CudaEngine:
    """CUDA graphs of one device in one private pool of memory.

    Intermediate results of one graph may lie where another keeps its outputs. That does no harm as long as graphs run
    one after the other and outputs are copied before the next one runs.
    """

    WARM_UPS = 2
    # A capture begins by synchronising the device, which would end another thread's.
    _capturing = threading.Lock()
    # Device -> captures that failed there, each of which has changed the generator under every graph that draws.
    _failures: ClassVar[Counter[torch.device]] = Counter()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._failures_before = self._failures[device]
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
            self._done = torch.cuda.Event()

    def warm_up(self, run: Callable[[], object]) -> None:
        with torch.cuda.device(self.device):
            # On the stream that is captured: the workspace of a cuBLAS handle belongs to a stream, and must not be
            # made while its allocations go to the pool.
            self._stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(self.WARM_UPS):
                        run()
            finally:  # what ran before an error reads buffers that are then freed
                torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, run: Callable[[], Tensors]) -> Captured:
        with self._capturing, torch.cuda.device(self.device):
            graph, stream, callers = torch.cuda.CUDAGraph(), self._stream, torch.cuda.current_stream()
            stream.wait_stream(callers)
            try:
                # Other threads may allocate and launch meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    outputs = run()
            except BaseException:
                # torch ends a capture before it goes back, and of one that is invalid it only raises.
                self._failures[self.device] += 1
                torch.cuda.set_stream(callers)
                _end_capturing(self.device, self._pool)
                raise
            callers.wait_stream(stream)
        return _CudaGraph(graph, outputs)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)

    def wait(self) -> None:
        self._done.synchronize()

    def bytes_held(self) -> int:
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self._pool))

    def is_stale(self) -> bool:
        return self._failures[self.device] != self._failures_before


def _end_capturing(device: torch.device, pool: Any) -> None:
    """Puts right what torch leaves behind where a capture fails. The pool is not to be used any more.

    The generator still takes itself for captured, and would draw nothing; a copy of its state does not. Graphs that
    were recorded with the old one and draw cannot be replayed any more. And the allocator still takes the pool for one
    that is recorded to: it would put off freeing what other streams have used, and never free the pool.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())
    if hasattr(torch._C, "_cuda_endAllocateToPool") and hasattr(torch._C, "_cuda_releasePool"):
        with suppress(RuntimeError):  # nothing is recorded to it: the capture itself had ended well
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)


@dataclass
class _CudaGraph:
    graph: torch.cuda.CUDAGraph
    outputs: Tensors

    def replay(self) -> None:
        self.graph.replay()


# Kind of device -> what captures there.
ENGINES: dict[str, Callable[[torch.device], Engine]] = {"cuda": CudaEngine}


class GraphTooLarge(RuntimeError):
    """One graph alone takes more memory than its cache may hold."""


class GraphCache:
    """The graphs used last, bounded in number and in bytes.

    Safe to use from several threads and streams: they take turns. A capture that fails makes all graphs go.

    Args:
        new_engine: makes the engine when the first graph is captured, and whenever the memory is given back.
        max_graphs: how many are kept; the one used least recently goes first.
        max_bytes: of device memory, buffers included. Graphs share a pool that shrinks only as a whole: the one that
            goes beyond the limit makes all others go.
    """

    def __init__(self, new_engine: Callable[[], Engine], max_graphs: int = 32, max_bytes: int = 2 << 30) -> None:
        self.max_graphs, self.max_bytes = max_graphs, max_bytes
        self.captures = self.replays = 0
        self.lock = threading.RLock()
        self._new_engine = new_engine
        self._engine: Engine | None = None
        self._held: OrderedDict[Hashable, tuple[StaticCall, Captured]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    @property
    def bytes_held(self) -> int:
        with self.lock:
            pool = 0 if self._engine is None else self._engine.bytes_held()
            return pool + sum(call.nbytes for call, _ in self._held.values())

    def replay(self, key: Hashable, make: Callable[[], StaticCall], request: Any) -> Any:
        """The result of `request` by the graph `key`, captured now where there is none; `make()` is its function.

        Raises:
            GraphTooLarge: it would not fit into `max_bytes`, even alone.
        """
        with self.lock:
            if self._engine is not None and self._engine.is_stale():
                self.clear()
            if key not in self._held:
                self._capture(key, make, request)
            self._held.move_to_end(key)
            call, captured = self._held[key]
            assert self._engine is not None
            with self._engine.exclusive():
                call.load(request)
                captured.replay()
                self.replays += 1
                return call.result(captured.outputs, request)

    def _capture(self, key: Hashable, make: Callable[[], StaticCall], request: Any) -> None:
        if len(self._held) >= self.max_graphs:
            self._wait()
            while len(self._held) >= max(self.max_graphs, 1):
                self._held.popitem(last=False)
        if self._engine is None:
            self._engine = self._new_engine()
        recording = False
        try:
            with self._engine.exclusive():
                call = make()
                call.load(request)
                recording = True
                self._engine.warm_up(call.run)
                captured = self._engine.record(call.run)
        except BaseException:
            # An engine that failed may not record again, nor replay what draws; and memory may be what was missing.
            if recording:
                self.clear()
            raise
        self.captures += 1
        self._held[key] = (call, captured)
        if (taken := self.bytes_held) <= self.max_bytes:
            return
        alone = len(self._held) == 1
        del captured
        self.clear()
        if alone:
            raise GraphTooLarge(f"its graph takes {taken} bytes, more than max_bytes={self.max_bytes}")
        self._capture(key, make, request)

    def _wait(self) -> None:
        """Buffers may be freed afterwards, and used by streams that know nothing of ours."""
        if self._engine is not None:
            self._engine.wait()

    def clear(self) -> None:
        """Forgets every graph and gives the memory back."""
        with self.lock:
            self._wait()
            self._held.clear()
            self._engine = None


def round_up(size: int) -> int:
    """The next size of three significant binary digits, 1 to 8, 10, 12, 14, 16, 20, ...: less than a quarter larger.

    A batch whose two sizes are rounded up leaves less than 1 - 0.8 ** 2 = 36 % of its capacity unused.
    """
    step = 1 << max(size.bit_length() - 3, 0)
    return -(-size // step) * step
