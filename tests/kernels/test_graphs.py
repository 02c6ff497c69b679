"""The cache of captured graphs, on tapes: which are kept, how large they may be, and that they take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from transkimmer_kernels.runtime import GraphCache, GraphTooLarge, graphs
from transkimmer_kernels.runtime.graphs import ENGINES, CudaEngine, round_up

from ..tape import Tape, TapeEngine


class Scaled:
    """factor * x + 1 on a buffer of `size` numbers."""

    def __init__(self, size: int, factor: float = 2.0) -> None:
        self.buffer, self.factor = torch.zeros(size), factor
        self.nbytes = self.buffer.nbytes

    def load(self, request: Tensor) -> None:
        self.buffer[: request.numel()].copy_(request)

    def run(self) -> dict[str, Tensor]:
        return {"y": self.buffer.mul(self.factor).add_(1)}

    def result(self, outputs: dict[str, Tensor], request: Tensor) -> Tensor:
        return outputs["y"][: request.numel()].clone()


def _cache(**limits: int) -> GraphCache:
    return GraphCache(lambda: TapeEngine(torch.device("cpu")), **limits)


def _ask(cache: GraphCache, size: int, *numbers: float) -> list[float]:
    return cache.replay(size, lambda: Scaled(size), torch.tensor(numbers)).tolist()


def test_one_capture_serves_many_requests() -> None:
    cache = _cache()
    first = cache.replay(8, lambda: Scaled(8), torch.tensor([1.0, 2.0]))
    assert _ask(cache, 8, 5, 6, 7) == [11, 13, 15]
    assert first.tolist() == [3, 5], "a result is a copy"
    assert _ask(cache, 4, 1) == [3] and _ask(cache, 8, 1) == [3], "graphs that share memory"
    assert (cache.captures, cache.replays, len(cache)) == (2, 4, 2)


def test_the_least_recently_used_goes_first() -> None:
    cache = _cache(max_graphs=2)
    for size in (1, 2, 1, 3):
        _ask(cache, size, 1)
    assert [size in cache for size in (1, 2, 3)] == [True, False, True]
    _ask(cache, 2, 1)
    assert cache.captures == 4 and len(cache) == 2 and 1 not in cache


def test_one_graph_is_held_whatever_the_limit() -> None:
    cache = _cache(max_graphs=0)
    assert _ask(cache, 1, 1) == _ask(cache, 2, 1) == [3]
    assert len(cache) == 1


def test_buffers_go_only_when_the_device_is_done_with_them() -> None:
    class Waiting(TapeEngine):
        def wait(self) -> None:
            super().wait()
            held.append(len(cache))

    held: list[int] = []
    cache = GraphCache(lambda: Waiting(torch.device("cpu")), max_graphs=1)
    _ask(cache, 1, 1)
    assert held == []
    _ask(cache, 2, 1)
    assert held == [1], "the graph that another takes the place of"
    cache.clear()
    assert held == [1, 1] and len(cache) == 0


def test_bytes_are_bounded() -> None:
    cache = _cache(max_bytes=1000)
    for size in (20, 30, 40):  # 8 bytes each for input and output
        _ask(cache, size, 1)
    assert len(cache) == 3 and cache.bytes_held == 8 * 90
    assert _ask(cache, 60, 1) == [3]
    assert len(cache) == 1 and cache.bytes_held == 8 * 60, "memory that is shared goes as a whole"
    with pytest.raises(GraphTooLarge, match=r"takes 1600 bytes, more than max_bytes=1000"):
        _ask(cache, 200, 1)
    assert len(cache) == cache.bytes_held == 0
    assert _ask(cache, 2, 1) == [3]


def test_a_failed_capture_leaves_nothing() -> None:
    class Reading(Scaled):
        def run(self) -> dict[str, Tensor]:
            return super().run() if float(self.buffer[0]) else {}

    cache = _cache()
    with pytest.raises(RuntimeError, match="_local_scalar_dense reads from the device"):
        cache.replay(1, lambda: Reading(1), torch.ones(1))
    assert len(cache) == cache.captures == 0
    assert _ask(cache, 1, 1) == [3]


def test_an_error_before_anything_is_recorded_leaves_the_graphs() -> None:
    class Unfit(Scaled):
        def load(self, request: Tensor) -> None:
            raise ValueError("does not fit")

    cache = _cache()
    _ask(cache, 1, 1)
    with pytest.raises(ValueError, match="does not fit"):
        cache.replay(2, lambda: Unfit(2), torch.ones(1))
    assert 1 in cache and _ask(cache, 1, 1) == [3] and cache.captures == 1


def test_a_failed_capture_takes_its_engine_along() -> None:
    """What a device's allocator and generator are left in concerns the graphs that are held, too."""

    class Fragile(TapeEngine):
        broken = False

        def record(self, run: Callable[[], dict[str, Tensor]]) -> Tape:
            assert not self.broken
            self.broken = True
            tape = super().record(run)
            self.broken = False
            return tape

        @contextmanager
        def exclusive(self) -> Iterator[None]:
            assert not self.broken
            with super().exclusive():
                yield

    class Failing(Scaled):
        def run(self) -> dict[str, Tensor]:
            raise ValueError("fails")

    engines: list[Fragile] = []

    def new_engine() -> Fragile:
        engines.append(Fragile(torch.device("cpu")))
        return engines[-1]

    cache = GraphCache(new_engine)
    assert _ask(cache, 1, 1) == _ask(cache, 2, 1) == [3]
    with pytest.raises(ValueError, match=r"^fails$"):
        cache.replay(3, lambda: Failing(3), torch.ones(1))
    assert len(cache) == cache.bytes_held == 0

    class FailingAtLast(Scaled):
        def run(self) -> dict[str, Tensor]:
            self.uses = getattr(self, "uses", 0) + 1
            return super().run() if self.uses <= TapeEngine.WARM_UPS else {"y": self.buffer / float(self.buffer[0])}

    assert _ask(cache, 1, 1) == [3]
    with pytest.raises(RuntimeError, match="cannot be captured"):
        cache.replay(3, lambda: FailingAtLast(3), torch.ones(1))
    assert engines[-1].broken and len(cache) == 0
    assert _ask(cache, 1, 1) == _ask(cache, 3, 1) == [3]
    assert len(engines) == 3 and len(cache) == 2


class Stream:
    def __init__(self) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class Generator:
    states = 1

    def clone_state(self) -> int:
        return self.states

    def graphsafe_set_state(self, state: int) -> None:
        self.states += state


class Cuda:
    """What `CudaEngine` uses of torch, which does as torch does where a capture becomes invalid."""

    def __init__(self) -> None:
        self.current = self.callers = Stream()
        self.default_generators = [Generator()]
        self.recording: list[tuple[int, Any]] = []
        self.released: list[tuple[int, Any]] = []
        self.Stream, self.Event, self.CUDAGraph = Stream, object, object

    def device(self, device: torch.device) -> Any:
        return nullcontext()

    def graph_pool_handle(self) -> tuple[int, int]:
        return 0, 7

    def current_stream(self) -> Stream:
        return self.current

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: object, *, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        before, self.current = self.current, stream
        self.recording.append((0, pool))
        yield  # what is raised leaves the stream and the pool as they are
        self.recording.remove((0, pool))
        self.current = before

    def end_allocate(self, device: int, pool: Any) -> None:
        if (device, pool) not in self.recording:
            raise RuntimeError("not currently recording to mempool_id")
        self.recording.remove((device, pool))

    def release_pool(self, device: int, pool: Any) -> None:
        self.released.append((device, pool))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    bindings = SimpleNamespace(_cuda_endAllocateToPool=cuda.end_allocate, _cuda_releasePool=cuda.release_pool)
    monkeypatch.setattr(graphs, "torch", SimpleNamespace(cuda=cuda, _C=bindings))
    return cuda


def _fails() -> dict[str, Tensor]:
    raise ValueError("fails")


def test_an_invalid_capture_leaves_neither_its_stream_nor_its_pool_behind(cuda: Cuda) -> None:
    engine = CudaEngine(torch.device("cuda", 0))
    assert engine.record(dict).outputs == {} and cuda.current is cuda.callers and cuda.released == []
    with pytest.raises(ValueError, match=r"^fails$"):
        engine.record(_fails)
    assert cuda.current is cuda.callers
    assert cuda.recording == [] and cuda.released == [(0, (0, 7))]
    assert cuda.default_generators[0].states == 2, "it draws from a copy"


def test_a_capture_that_torch_has_ended_is_not_ended_again(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "graph", lambda *args, **kwargs: nullcontext())
    with pytest.raises(ValueError, match=r"^fails$"):
        CudaEngine(torch.device("cuda", 0)).record(_fails)
    assert cuda.current is cuda.callers and cuda.released == []


def test_the_caller_waits_for_a_warm_up_that_fails(cuda: Cuda) -> None:
    engine, streams = CudaEngine(torch.device("cuda", 0)), []

    def run() -> dict[str, Tensor]:
        streams.append(cuda.current)
        return _fails()

    with pytest.raises(ValueError, match=r"^fails$"):
        engine.warm_up(run)
    assert cuda.current is cuda.callers and cuda.callers.waited_for == streams


def test_a_failed_capture_makes_every_engine_of_its_device_stale(cuda: Cuda) -> None:
    cuda.default_generators.append(Generator())
    devices = [torch.device("cuda", index) for index in (0, 1)]
    failing, beside, elsewhere = CudaEngine(devices[0]), CudaEngine(devices[0]), CudaEngine(devices[1])
    with pytest.raises(ValueError, match=r"^fails$"):
        failing.record(_fails)
    assert failing.is_stale() and beside.is_stale() and not elsewhere.is_stale()
    assert not CudaEngine(devices[0]).is_stale()


def test_captures_take_turns(cuda: Cuda) -> None:
    """One begins by waiting for the whole device, which would end another."""
    entered, leave, order = threading.Event(), threading.Event(), []

    def first() -> dict[str, Tensor]:
        entered.set()
        assert leave.wait(60)
        order.append("first")
        return {}

    def second() -> dict[str, Tensor]:
        order.append("second")
        return {}

    device = torch.device("cuda", 0)
    threads = [threading.Thread(target=CudaEngine(device).record, args=(run,)) for run in (first, second)]
    threads[0].start()
    assert entered.wait(60)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive() and order == []
    leave.set()
    for thread in threads:
        thread.join()
    assert order == ["first", "second"]


def test_graphs_of_a_stale_engine_are_captured_anew() -> None:
    engines = []

    def new_engine() -> TapeEngine:
        engines.append(TapeEngine(torch.device("cpu")))
        return engines[-1]

    cache = GraphCache(new_engine)
    assert _ask(cache, 2, 1.0) == _ask(cache, 2, 1.0) and cache.captures == 1
    engines[0].stale = True
    assert len(_ask(cache, 2, 1.0)) == 1 and cache.captures == 2 and len(engines) == 2
    assert len(_ask(cache, 2, 1.0)) == 1 and cache.captures == 2


def test_threads_take_turns() -> None:
    cache = _cache(max_graphs=2)
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for i in range(60):
                if _ask(cache, 1 + i % 3, number) != [2 * number + 1]:
                    wrong.append(number)
        except BaseException as error:  # an assertion in a thread would otherwise be lost
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and cache.replays == 240


def test_sizes_waste_less_than_a_quarter() -> None:
    assert [round_up(n) for n in (1, 5, 8, 9, 16, 17, 33, 128, 129, 512)] == [1, 5, 8, 10, 16, 20, 40, 128, 160, 512]
    for n in range(1, 5000):
        assert n <= round_up(n) < 1.25 * n and round_up(round_up(n)) == round_up(n)
    assert len({round_up(n) for n in range(1, 513)}) == 32


def test_a_tape_is_as_strict_as_a_graph() -> None:
    """What Python decided stays decided, and results lie where they lay."""
    call = Scaled(2)
    tape = TapeEngine(torch.device("cpu")).record(call.run)
    assert isinstance(tape, Tape) and tape.outputs["y"].isnan().all()
    call.factor = 5.0
    call.load(torch.tensor([1.0, 2.0]))
    place = tape.outputs["y"].data_ptr()
    tape.replay()
    assert tape.outputs["y"].tolist() == [3, 5] and tape.outputs["y"].data_ptr() == place


def test_only_cuda_captures() -> None:
    assert {"cuda": CudaEngine} == ENGINES
