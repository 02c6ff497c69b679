"""On a device nothing in a forward may wait for the token count: shown with meta tensors, which have no values.

Reading one on the host (`.item()`, `.tolist()`, boolean indexing, `nonzero`) raises. Operators are represented by their
fakes. The Triton kernels' host code runs for real, in the interpreter, and is watched for the operations that read.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transkimmer.policies import PredictorPolicy, SchedulePolicy

from transkimmer_kernels import KernelSet, Ragged, kernel_set
from transkimmer_kernels.runtime import LayerWeights, Policy, PredictorWeights, Trace, run_encoder

from ..tape import read_by
from ..target import Target
from .dense_encoder import first_token_only, random_layer

WIDTH, HEADS, FF, DEPTH = 64, 2, 128, 3


def _layers(activation: object = "gelu", device: str = "meta") -> list[LayerWeights]:
    layers = [random_layer(WIDTH, FF, activation, torch.bfloat16, device) for _ in range(DEPTH)]
    return [*layers[:-1], first_token_only(layers[-1])]


def _predictor(device: str = "meta") -> PredictorWeights:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    vectors = [normal(WIDTH) for _ in range(6)]
    return PredictorWeights(
        *vectors[:2], normal(WIDTH, WIDTH), vectors[2], *vectors[3:5], vectors[5], normal(1), eps=1e-5
    )


def _forward(kernels: KernelSet, layers: list[LayerWeights], policy: Policy | None, mask: Tensor) -> None:
    hidden = torch.randn(4, 9, WIDTH, device=mask.device, dtype=torch.bfloat16)
    batch = Ragged.from_padded(hidden, mask, kernels)
    run_encoder(batch, layers, HEADS, kernels, policy=policy, trace=Trace())
    assert batch.slots.numel() == 36, "the list keeps its capacity"


@pytest.mark.parametrize("sample", [False, True], ids=["threshold", "sample"])
@pytest.mark.parametrize("activation", ["gelu", torch.tanh], ids=["fused", "composed"])
def test_inference_reads_nothing_back(sample: bool, activation: object) -> None:
    kernels = kernel_set("reference", "meta", torch.bfloat16)
    policy = PredictorPolicy([_predictor()] * DEPTH, kernels, 0.0, sample)
    _forward(kernels, _layers(activation), policy, torch.ones(4, 9, device="meta"))


@pytest.mark.parametrize("length", [9, 4000])
def test_a_schedule_reads_nothing_within_its_bound(length: int) -> None:
    """And of longer lists it does: a read would be seen."""
    kernels = kernel_set("reference", "meta", torch.bfloat16)
    mask = torch.ones(2, length, device="meta")
    batch = Ragged.from_padded(torch.randn(2, length, WIDTH, device="meta"), mask, kernels)
    may_read = pytest.raises(RuntimeError, match="cannot be called on meta tensors") if length > 2048 else nullcontext()
    with may_read:
        policy = SchedulePolicy([1.0, 0.5, 0.25], batch, [_predictor()] * DEPTH, kernels)
        policy(1, batch)


class _Reads(TorchDispatchMode):
    """Counts what a device would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := read_by(func, args)) is not None:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.operators("encoder_layer_", "skim_tokens", "compact")
@pytest.mark.parametrize("activation", ["gelu", torch.tanh], ids=["fused", "composed"])
def test_no_host_code_around_a_kernel_reads(target: Target, activation: object) -> None:
    if target.backend != "triton":
        pytest.skip(f"{target}: the other backends on a CPU may read, and their GPU kernels have no Python around them")
    kernels = kernel_set("triton", target.device, torch.bfloat16)
    mask = torch.ones(4, 9, device=target.device)
    mask[1:3, 4:] = 0
    policy = PredictorPolicy([_predictor(target.device)] * DEPTH, kernels, 0.0, False)
    layers = _layers(activation, target.device)
    with _Reads() as reads, torch.no_grad():
        _forward(kernels, layers, policy, mask)
        assert not reads.seen
        hidden = torch.ones(3)
        assert hidden[hidden > 0].sum().item() == 3
    assert reads.seen == {"index": 1, "_local_scalar_dense": 1}, "a read would be seen"
