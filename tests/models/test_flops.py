"""FLOPs that PyTorch's counter finds in our operators: the dense model's, the closed forms', real tokens only."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, PreTrainedModel
from transkimmer import SkimConfig, add_skimming, record_skimming
from transkimmer.flops import EncoderShape, count_flops

import transkimmer_kernels as tk
from transkimmer_kernels.library import OPERATORS
from transkimmer_kernels.ops.counting import pair_count

from ..ops.cases import offsets
from .tiny import ARCHITECTURES, KERNELS, no_dropout, padded_inputs, tiny, undecided_predictors

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_kernels = pytest.mark.parametrize("kernels", KERNELS)


def shape_of(model: PreTrainedModel) -> EncoderShape:
    return EncoderShape.of(model.config, model.config.hidden_size)


def full_inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Without padding, so that a padded model does nothing but what is asked for."""
    return padded_inputs((length,) * batch)


def eager(architecture: str) -> PreTrainedModel:
    """A dense model whose attention is made of products that PyTorch's counter knows."""
    model = tiny(architecture)
    model.set_attn_implementation("eager")
    return no_dropout(model)


def test_every_operator_that_multiplies_has_a_formula() -> None:
    assert {name for name, operator in OPERATORS.items() if operator.flops is None} == {
        "add_norm",
        "add_norm_backward",
        "choose_rows",
        "choose_rows_backward",
        "compact",
        "embed_tokens",
        "gather_rows",
        "scatter_rows",
    }


@pytest.mark.parametrize(("length", "macs"), [(128, 931_135_488), (512, 4_026_531_840)])
@torch.no_grad()
def test_a_layer_of_bert_base(length: int, macs: int) -> None:
    """12 n d^2 + 2 n^2 d multiply-adds; of a list whose end is garbage, which costs nothing."""
    config = BertConfig()
    width, ffn = config.hidden_size, config.intermediate_size
    matrices = {"qkv": (3 * width, width), "out": (width, width), "ffn_in": (ffn, width), "ffn_out": (width, ffn)}
    weights = {f"{name}_weight": torch.zeros(shape) for name, shape in matrices.items()}
    biases = {f"{name}_bias": torch.zeros(shape[0]) for name, shape in matrices.items()}
    norms = {f"norm{i}_{part}": torch.ones(width) for i in (1, 2) for part in ("weight", "bias")}
    slots, cu_seqlens = torch.arange(length + 7, dtype=torch.int32), torch.tensor([0, length], dtype=torch.int32)
    arguments = dict(max_seqlen=length, num_heads=12, kernels="reference", **weights, **biases, **norms)
    with count_flops() as counted:
        tk.encoder_layer_(torch.zeros(length + 7, width), slots, cu_seqlens, **arguments)
    assert counted.of_operators() == 2 * macs
    assert int(EncoderShape.of(config).layer_macs(torch.tensor(length))) == macs


@every_kernels
@torch.no_grad()
def test_a_predictor_of_bert_base(kernels: str) -> None:
    """d^2 + 2d multiply-adds by the paper's count, of which we need d^2 + d; the first of 9 tokens is not scored."""
    width = 768
    hidden, slots = torch.randn(12, width), torch.arange(12, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 9, 9], dtype=torch.int32)
    ones, fc = torch.ones(width), torch.randn(width, width)
    weights = (ones, ones, fc, ones, ones, ones, ones, torch.zeros(1))
    for operator, rows in ((tk.skim_logit, 9), (tk.skim_tokens, 8)):
        with count_flops() as counted:
            operator(hidden, slots, cu_seqlens, *weights, kernels=kernels)
        assert counted.of_operators() == counted.get_total_flops() == 2 * rows * (width * width + width)
    shape = EncoderShape.of(BertConfig(), width)
    assert int(shape.predictor_macs(torch.tensor(9))) == 8 * (width * width + 2 * width)
    assert int(shape.as_executed().predictor_macs(torch.tensor(9))) == 8 * (width * width + width)
    assert int(shape.as_executed(scores_first=True).predictor_macs(torch.tensor(9))) == 9 * (width * width + width)


@every_architecture
@every_kernels
@torch.no_grad()
def test_keep_all_costs_what_the_dense_model_costs(architecture: str, kernels: str) -> None:
    inputs = full_inputs(3, 9)
    with count_flops() as dense:
        eager(architecture)(**inputs)
    model = add_skimming(tiny(architecture), kernels=kernels)
    model.skimming.enabled = False
    with count_flops() as off:
        model(**inputs)
    assert off.get_total_flops() == dense.get_total_flops()
    shape, lengths = shape_of(model), torch.full((3,), 9)
    assert off.of_operators() == shape.dense_flops(lengths)
    model.skimming.enabled = True
    with count_flops() as skimming:
        model(**inputs)
    predictors = 2 * shape.layers * int(shape.as_executed().predictor_macs(lengths).sum())
    assert skimming.get_total_flops() == dense.get_total_flops() + predictors


@every_architecture
@every_kernels
@pytest.mark.parametrize("head", [None, "sequence"])
@pytest.mark.parametrize("decision", ["threshold", "sample"])
@torch.no_grad()
def test_a_pruned_run_costs_the_closed_form(architecture: str, kernels: str, head: str | None, decision: str) -> None:
    """Of real tokens and of those that are left of them, whatever buffers a backend makes."""
    model = add_skimming(tiny(architecture, head), SkimConfig(decision=decision), kernels=kernels)
    undecided_predictors(model)
    with record_skimming() as records, count_flops() as counted:
        model(**padded_inputs())
    lengths, layers = records[0].lengths, records[0].layer_lengths
    assert layers.sum() < 0.9 * lengths.sum() * len(layers)
    shape = shape_of(model).as_executed(scores_first=decision == "sample")
    assert counted.of_operators() == shape.skimming_flops(lengths, layers, first_token_only=head is not None)


@every_architecture
def test_a_training_step_costs_what_the_dense_models_does(architecture: str) -> None:
    """But for the scores, which the packed attention computes once more on the way back instead of keeping them."""
    inputs = full_inputs(2, 7)
    model = no_dropout(add_skimming(tiny(architecture))).train()
    model.skimming.enabled = False
    totals = []
    for trained in (eager(architecture).train(), model):
        with count_flops() as counted:
            trained(**inputs).last_hidden_state.sum().backward()
        totals.append(counted.get_total_flops())
    shape = shape_of(model)
    scores = shape.layers * 2 * 7 * 7 * 2 * shape.hidden
    assert totals[1] - totals[0] == scores


def test_of_a_fake_tensor_the_bound_is_counted() -> None:
    """Its offsets have no values: every row of the list might be one."""
    with FakeTensorMode():
        x, weight = torch.empty(10, 4), torch.empty(6, 4)
        cu_seqlens = torch.empty(3, dtype=torch.int32)
        q = torch.empty(10, 2, 8)
        with count_flops() as linear:
            torch.ops.transkimmer.ragged_linear.reference(x, weight, None, cu_seqlens, None, "none")
        with count_flops() as attention:
            torch.ops.transkimmer.ragged_attention.reference(q, q, q, cu_seqlens, cu_seqlens, 5, 7, 1.0, None, False)
    assert linear.of_operators() == 2 * 10 * 4 * 6
    assert attention.of_operators() == 2 * 2 * (10 * 7) * 16


def test_pairs_of_queries_with_keys_of_other_numbers() -> None:
    """As in the last layer, where one token of each sequence asks."""

    def counted(queries: tuple[int, ...], keys: tuple[int, ...]) -> int:
        return pair_count(offsets(queries), offsets(keys), sum(queries), max(keys))

    assert counted((1, 1), (5, 3)) == 8
    assert counted((2, 0, 3), (4, 5, 1)) == 2 * 4 + 3 * 1


def test_sequences_longer_than_the_padding_are_not_shortened() -> None:
    shape, lengths = EncoderShape.of(BertConfig(), 768), torch.tensor([300, 10])
    layers = lengths.expand(12, -1) // 2
    padded = shape.dense_flops(torch.tensor([300, 256]))
    assert shape.padded_flops_speedup(lengths, layers, 256) == padded / shape.skimming_flops(lengths, layers)


@pytest.mark.parametrize("predictor", [96, 384])
@pytest.mark.parametrize("speedup", [1.5, 2.0, 3.0])
def test_share_of_the_tokens_that_leads_to_a_speedup(predictor: int, speedup: float) -> None:
    shape = EncoderShape(6, 384, 1536, predictor)
    lengths = torch.full((100,), 60)
    falling = torch.linspace(1.5, 0.5, 6) * shape.share_at(speedup)  # [layers]
    layers = (falling[:, None] * lengths).round().long()
    assert shape.flops_speedup(lengths, layers) == pytest.approx(speedup, rel=0.06)
