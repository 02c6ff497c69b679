"""How many kernels a layer launches on `triton`, predictor included: counted on the host, nothing runs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transkimmer_kernels import Ragged, triton_support
from transkimmer_kernels.library import OPERATORS
from transkimmer_kernels.ops.encoder_layer.compose import compose_layer_
from transkimmer_kernels.runtime import LayerWeights, PredictorWeights

from .dense_encoder import first_token_only, random_layer

if (REASON := triton_support.why_not_importable()) is not None:
    pytest.skip(REASON, allow_module_level=True)
if triton_support.interpreted():
    pytest.skip("the interpreter has a launcher of its own", allow_module_level=True)

from .launches import launches_go_to

PREDICTOR = ["norm_kernel", "product_kernel", "_finish"]
COMPACT = ["_count_kept", "_write_kept"]
LAYER = ["product_kernel", "attention_kernel", "product_kernel", "norm_kernel"]
LAYER += ["product_kernel", "product_kernel", "norm_kernel"]
# Operators of PyTorch that launch nothing.
FREE = ("empty", "new_empty", "empty_like", "view", "_unsafe_view", "select", "slice", "unbind", "alias", "detach")


class _Launched(TorchDispatchMode):
    """Names of the launched kernels and of PyTorch's operators that launch one, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def launch(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        self.names.append(kernel.__name__)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class _InPython:
    """A `KernelSet` of the Triton backend's functions, without the dispatcher, behind which no mode would look."""

    def __init__(self) -> None:
        self.serves = dict.fromkeys(OPERATORS, "triton")
        for name in ("compact", "ragged_attention", "skim_tokens"):
            setattr(self, name, getattr(importlib.import_module(f"transkimmer_kernels.ops.{name}.triton"), name))
        linear = importlib.import_module("transkimmer_kernels.ops.ragged_linear.triton")
        for name in ("ragged_linear", "ragged_linear_norm", "ragged_linear_norm_"):
            setattr(self, name, getattr(linear, name))


def _predictor(width: int, inner: int) -> PredictorWeights:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    norm1, norm2 = (zeros(width), zeros(width)), (zeros(inner), zeros(inner))
    return PredictorWeights(*norm1, zeros(inner, width), zeros(inner), *norm2, zeros(inner), zeros(1), eps=1e-5)


def _launches(width: int, inner: int, capacity: int, layer: LayerWeights) -> list[str]:
    """Of one skimming decision and the layer behind it, by a batch of 8 sequences."""
    launched, predictor = _Launched(), _predictor(width, inner)

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.launch(kernel)

    with launches_go_to(run):
        kernels: Any = _InPython()
        cu_seqlens = torch.arange(9, dtype=torch.int32) * (capacity // 8)
        batch = Ragged.from_packed(torch.zeros(capacity, width, dtype=torch.bfloat16), cu_seqlens, capacity // 8)
        state = (batch.hidden, batch.slots, cu_seqlens, batch.max_seqlen, width // 64)
        with launched, torch.no_grad():
            predictor.skim(batch, kernels, 0.0)
            compose_layer_(kernels, *state, *layer.arguments)
    return launched.names


@pytest.mark.parametrize(
    ("width", "inner", "capacity", "expected"),
    [
        pytest.param(384, 192, 2048, [*PREDICTOR, COMPACT[1], *LAYER], id="11, narrow predictor"),
        pytest.param(768, 768, 2048, [*PREDICTOR, COMPACT[1], *LAYER], id="11, BERT-base"),
        pytest.param(768, 768, 4096, [*PREDICTOR, *COMPACT, *LAYER], id="12, BERT-base and more than 2048 tokens"),
    ],
)
def test_launches_of_a_skimming_layer(width: int, inner: int, capacity: int, expected: list[str]) -> None:
    layer = random_layer(width, 4 * width, "gelu", torch.bfloat16, "cpu")
    assert _launches(width, inner, capacity, layer) == expected


def test_an_operator_of_pytorch_would_be_counted() -> None:
    """Under a head that reads the first token, the last layer finds those tokens by a list of nobody, compacted."""
    layer = first_token_only(random_layer(384, 1536, "gelu", torch.bfloat16, "cpu"))
    launched = _launches(384, 192, 2048, layer)
    first = [LAYER[0], "zeros_like", COMPACT[1]]
    assert launched == [*PREDICTOR, COMPACT[1], *first, *LAYER]
