"""`run_encoder` with a policy made by hand, against a dense encoder that only masks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import transkimmer_kernels as tk
from transkimmer_kernels import Ragged, kernel_set
from transkimmer_kernels.runtime import LayerWeights, PredictorWeights, Trace, run_encoder

from ..ops import cases, oracle
from ..ops.cases import Source
from ..ops.closeness import assert_close_as_torch
from ..ops.operators import PREDICTOR, cast, single_thread
from ..target import TARGETS, Target
from .dense_encoder import cast_layer, dense_encoder, first_token_only, random_layer

WIDTH, HEADS, FF, DEPTH = 64, 2, 128, 3
BATCHES = {"awkward": (65, 0, 1, 130, 17), "one-token": (1, 1), "nothing": (0, 0)}
OPERATORS = ("compact", "encoder_layer_")
PARTS = ("compact", "ragged_linear", "ragged_attention", "ragged_linear_norm", "ragged_linear_norm_")
MATRICES = ("qkv_weight", "out_weight", "ffn_in_weight", "ffn_out_weight")
# Unlike the default, and unlike each other: neither may take the other's place.
EPS = {"norm1_eps": 0.3, "norm2_eps": 0.05}
runs_encoder = pytest.mark.operators(*OPERATORS, *PARTS)


class Problem:
    """A padded batch, layers, and who is kept where: `alive[l]` bool [B, S], shrinking, always with the first token."""

    def __init__(
        self,
        target: Target,
        lengths: tuple[int, ...],
        dtype: torch.dtype,
        *,
        skim: bool = True,
        activation: Any = "gelu",
    ) -> None:
        self.target, self.dtype, self.kernels = target, dtype, kernel_set(target.backend, target.device)
        self.length = max(lengths) + 3
        layers = [random_layer(WIDTH, FF, activation, dtype, target.device) for _ in range(DEPTH)]
        self.layers = [dataclasses.replace(layer, **EPS) for layer in layers]
        self.real = torch.arange(self.length) < torch.tensor(lengths)[:, None]
        self.hidden = torch.randn(len(lengths), self.length, WIDTH).to(dtype)
        self.hidden[~self.real] = torch.nan  # padding is dropped at the door
        kept = self.real
        self.alive = []
        for _ in range(DEPTH):
            kept = kept & (torch.rand(kept.shape) < 0.6) if skim else kept
            kept[:, 0] = self.real[:, 0]
            self.alive.append(kept.to(target.device))
        self.hidden, self.real = self.hidden.to(target.device), self.real.to(target.device)

    def policy(self, layer: int, batch: Ragged) -> None:
        """Drops the first token, too, which is not its to drop; garbage beyond the count asks to be kept."""
        keep = torch.ones(batch.capacity, dtype=torch.bool, device=batch.slots.device)
        listed = batch.slots[: int(batch.cu_seqlens[-1])].long()
        keep[: listed.numel()] = self.alive[layer].flatten()[listed] & (listed % self.length != 0)
        batch.keep(keep, self.kernels)

    def packed(self, layer: LayerWeights) -> LayerWeights:
        """Matrices in the form the backend likes best, as the model layer passes them."""
        pack = self.kernels.pack_weight
        matrices = {name: pack(getattr(layer, name)) for name in MATRICES}
        query = None if layer.query_weight is None else pack(layer.query_weight)
        return dataclasses.replace(layer, **matrices, query_weight=query)

    def run(
        self, *, depth: int = DEPTH, pack: bool = False, skim: bool = True, first_only: bool = False, **options: Any
    ) -> Tensor:
        """[B, S, d] after `depth` layers, by this target's operators and no others."""
        hidden = self.hidden.clone()
        layers = self.layers[:depth]
        if first_only:
            layers = [*layers[:-1], first_token_only(layers[-1])]
        layers = [self.packed(layer) if pack else layer for layer in layers]
        operators = OPERATORS if isinstance(layers[0].activation, str) else PARTS
        with self.target.only(*operators), torch.no_grad():
            batch = Ragged.from_padded(hidden, self.real, self.kernels)
            run_encoder(batch, layers, HEADS, self.kernels, policy=self.policy if skim else None, **options)
        return hidden

    def dense(self, dtype: torch.dtype) -> Tensor:
        layers = [cast_layer(layer, dtype) for layer in self.layers]
        with torch.no_grad(), single_thread():
            # The dense encoder computes its padding, whose keys are masked but whose NaN would get through.
            return dense_encoder(self.hidden.nan_to_num().to(dtype), self.alive, layers, HEADS)


dtypes = pytest.mark.parametrize(
    ("target", "dtype"), [pytest.param(t, d, id=f"{t}-{d}") for t in TARGETS for d in (torch.float32, torch.bfloat16)]
)


@runs_encoder
@dtypes
@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("skim", [False, True], ids=["keep-all", "skim"])
@pytest.mark.parametrize("lengths", BATCHES)
def test_equals_masked_dense_encoder(target: Target, dtype: torch.dtype, lengths: str, skim: bool, pack: bool) -> None:
    """Forwarded rows included: every real row of the result, at whatever layer it was left behind."""
    problem = Problem(target, BATCHES[lengths], dtype, skim=skim)
    actual = problem.run(pack=pack, skim=skim)
    real = problem.real
    truth, yardstick = (problem.dense(d)[real] for d in (torch.float64, dtype))
    assert_close_as_torch(actual[real], truth, yardstick)
    assert actual[~real].isnan().all(), "padding was written"


@runs_encoder
@pytest.mark.parametrize("activation", [F.relu, torch.tanh], ids=lambda function: function.__name__)
@pytest.mark.parametrize("first_only", [False, True])
def test_any_activation(target: Target, activation: Any, first_only: bool) -> None:
    """Composed of the single operators."""
    problem = Problem(target, BATCHES["awkward"], torch.float32, activation=activation)
    seen = problem.real.clone()
    seen[:, 1:] &= not first_only
    truth, yardstick = (problem.dense(d)[seen] for d in (torch.float64, torch.float32))
    assert_close_as_torch(problem.run(first_only=first_only)[seen], truth, yardstick)


@runs_encoder
@dtypes
def test_skimmed_rows_are_untouched_bit_for_bit(target: Target, dtype: torch.dtype) -> None:
    """A token dropped before layer l is, at the end, what l layers made of it."""
    problem = Problem(target, BATCHES["awkward"], dtype)
    final, before = problem.run(), problem.real
    for depth in range(DEPTH):
        leaves = before & ~problem.alive[depth]
        assert leaves.any()
        state = problem.run(depth=depth)[leaves] if depth else problem.hidden[leaves]
        assert torch.equal(final[leaves], state)
        before = problem.alive[depth]


@runs_encoder
@dtypes
@pytest.mark.parametrize("lengths", BATCHES)
def test_first_token_only_is_exact(target: Target, dtype: torch.dtype, lengths: str) -> None:
    """The first tokens are as close to the oracle as in a full run; all others keep the state of the layer before."""
    problem = Problem(target, BATCHES[lengths], dtype)
    actual = problem.run(first_only=True, pack=True)
    first = torch.zeros_like(problem.real)
    first[:, 0] = problem.real[:, 0]
    truth, yardstick = (problem.dense(d)[first] for d in (torch.float64, dtype))
    assert_close_as_torch(actual[first], truth, yardstick)
    others = problem.real & ~first
    assert torch.equal(actual[others], problem.run(depth=DEPTH - 1, pack=True)[others])


@runs_encoder
def test_batch_mates_do_not_matter(target: Target) -> None:
    """Another batch around it, same lengths, even NaN: the same bits; in another order: as close to the oracle."""
    problem = Problem(target, (65, 17, 130), torch.float32)
    expected = problem.run()
    truth, yardstick = (problem.dense(d) for d in (torch.float64, torch.float32))
    for foreign in (2.0, torch.nan):
        other = Problem(target, (65, 17, 130), torch.float32)
        other.layers, other.alive, other.hidden = problem.layers, problem.alive, problem.hidden.clone()
        other.hidden[::2] = foreign
        actual = other.run()
        assert torch.equal(actual[1][problem.real[1]], expected[1][problem.real[1]])
    order = [2, 0, 1]
    other.hidden, other.real = problem.hidden[order], problem.real[order]
    other.alive = [alive[order] for alive in problem.alive]
    actual, real = other.run(), other.real
    assert_close_as_torch(actual[real], truth[order][real], yardstick[order][real])


@runs_encoder
def test_trace_lists_the_survivors(target: Target) -> None:
    problem = Problem(target, BATCHES["awkward"], torch.float32)
    trace = Trace()
    problem.run(trace=trace)
    assert len(trace.slots) == len(trace.cu_seqlens) == DEPTH
    for alive, slots, cu_seqlens in zip(problem.alive, trace.slots, trace.cu_seqlens, strict=True):
        assert slots[: int(cu_seqlens[-1])].tolist() == alive.flatten().nonzero().flatten().tolist()
        assert cu_seqlens.diff().tolist() == alive.sum(1).tolist()


@runs_encoder
def test_states_with_strides_are_refused(target: Target) -> None:
    """The overloads take rows to be dense, and write them."""
    problem = Problem(target, (5, 3), torch.float32)
    batch = Ragged.from_padded(problem.hidden.clone(), problem.real, problem.kernels)
    batch.hidden = batch.hidden.T.contiguous().T
    with pytest.raises(ValueError, match=r"^hidden: is written in place and must be contiguous, got \(1, 16\)"):
        run_encoder(batch, problem.layers, HEADS, problem.kernels)


@runs_encoder
def test_one_layer_several_times(target: Target) -> None:
    """ALBERT: the same object at every depth."""
    problem = Problem(target, BATCHES["awkward"], torch.float32)
    problem.layers = [problem.layers[0]] * DEPTH
    real = problem.real
    truth, yardstick = (problem.dense(d)[real] for d in (torch.float64, torch.float32))
    assert_close_as_torch(problem.run(pack=True)[real], truth, yardstick)


@pytest.mark.operators("skim_logit", "skim_tokens")
def test_predictor_passes_its_weights_in_order(target: Target) -> None:
    kwargs = cases.skim_logit(Source(torch.float32, target.device), (5, 1), width=16, inner=8)
    weights = PredictorWeights(**{name: kwargs[name] for name in PREDICTOR}, eps=1e-3)
    batch = Ragged(kwargs["hidden"], kwargs["slots"], kwargs["cu_seqlens"], 5)
    expected = tk.skim_logit(**kwargs, eps=1e-3, kernels=target.backend)
    kernels = kernel_set(target.backend, target.device)
    assert torch.equal(weights.logit(batch, kernels)[:6], expected[:6])
    assert expected[:6].isfinite().all()
    threshold = float(expected[:6].median())
    weights.skim(batch, kernels, threshold)
    keep = [i in (0, 5) or bool(expected[i] >= threshold) for i in range(6)]
    assert batch.slots[: int(batch.cu_seqlens[-1])].tolist() == kwargs["slots"][:6][torch.tensor(keep)].tolist()


@pytest.mark.operators(*OPERATORS)
def test_the_public_layer_passes_its_weights_in_order(target: Target) -> None:
    problem = Problem(target, (5, 3), torch.float32, skim=False)
    layer = problem.layers[0]
    expected = problem.run(depth=1, skim=False)
    weights = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    hidden = problem.hidden.clone()
    batch = Ragged.from_padded(hidden, problem.real, problem.kernels)
    lists = {"slots": batch.slots, "cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
    tk.encoder_layer_(batch.hidden, **lists, num_heads=HEADS, **weights, kernels=target.backend)
    assert torch.equal(hidden[problem.real], expected[problem.real])


@pytest.mark.operators("embed_tokens")
@dtypes
def test_embeddings_take_the_eps_they_are_given(target: Target, dtype: torch.dtype) -> None:
    kwargs = cases.embed_tokens(Source(dtype, target.device), (5, 3), width=WIDTH) | {"eps": 0.3}
    truth, yardstick = (oracle.embed_tokens(**cast(kwargs, d))[0] for d in (torch.float64, dtype))
    assert_close_as_torch(target.call(tk.embed_tokens, **kwargs), truth, yardstick)
