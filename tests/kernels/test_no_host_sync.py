"""On a device nothing in a forward may wait for the token count: shown with meta tensors, which have no values.

Reading one on the host (`.item()`, `.tolist()`, boolean indexing, `nonzero`) raises. Operators are represented by their
fakes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transkimmer.policies import PredictorPolicy, SchedulePolicy

from transkimmer_kernels import KernelSet, Ragged, kernel_set
from transkimmer_kernels.runtime import LayerWeights, Policy, PredictorWeights, Trace, run_encoder

from .dense_encoder import first_token_only, random_layer

WIDTH, HEADS, FF, DEPTH = 64, 2, 128, 3


def _layers(activation: object = "gelu") -> list[LayerWeights]:
    layers = [random_layer(WIDTH, FF, activation, torch.bfloat16, "meta") for _ in range(DEPTH)]
    return [*layers[:-1], first_token_only(layers[-1])]


def _predictor() -> PredictorWeights:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="meta", dtype=torch.bfloat16)

    vectors = [normal(WIDTH) for _ in range(6)]
    return PredictorWeights(
        *vectors[:2], normal(WIDTH, WIDTH), vectors[2], *vectors[3:5], vectors[5], normal(1), eps=1e-5
    )


def _forward(kernels: KernelSet, layers: list[LayerWeights], policy: Policy | None, mask: Tensor) -> None:
    batch = Ragged.from_padded(torch.randn(4, 9, WIDTH, device="meta", dtype=torch.bfloat16), mask, kernels)
    run_encoder(batch, layers, HEADS, kernels, policy=policy, trace=Trace())
    assert batch.slots.numel() == 36, "the list keeps its capacity"


@pytest.mark.parametrize("sample", [False, True], ids=["threshold", "sample"])
@pytest.mark.parametrize("activation", ["gelu", torch.tanh], ids=["fused", "composed"])
def test_inference_reads_nothing_back(sample: bool, activation: object) -> None:
    kernels = kernel_set("reference", "meta", torch.bfloat16)
    policy = PredictorPolicy([_predictor()] * DEPTH, kernels, 0.0, sample)
    _forward(kernels, _layers(activation), policy, torch.ones(4, 9, device="meta"))


def test_a_read_would_be_seen() -> None:
    """The schedule policy looks at the lengths when it is made; it is for benchmarks."""
    kernels = kernel_set("reference", "meta", torch.bfloat16)
    batch = Ragged.from_padded(torch.randn(4, 9, WIDTH, device="meta"), torch.ones(4, 9, device="meta"), kernels)
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        SchedulePolicy([1.0, 0.5, 0.25], batch, [_predictor()] * DEPTH, kernels)
