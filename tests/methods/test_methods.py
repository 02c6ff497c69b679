"""The method's formulas against closed forms, frequencies and finite differences."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig
from transkimmer import SkimConfig
from transkimmer.bench.workload import SCHEDULES, parse_schedule
from transkimmer.flops import EncoderShape
from transkimmer.policies import SchedulePolicy
from transkimmer.predictor import SkimPredictor
from transkimmer.training_forward import PackedSequences, keep_attention, straight_through_keep

import transkimmer_kernels as tk
from transkimmer_kernels import Ragged, kernel_set

REFERENCE = kernel_set("reference", "cpu")
PAPER = json.loads((Path(__file__).parents[2] / "benchmarks/paper.json").read_text(encoding="utf-8"))


def test_flops_closed_forms() -> None:
    shape = EncoderShape.of(BertConfig(), predictor=768)
    assert shape.layer_macs(torch.tensor([128, 512])).tolist() == [931_135_488, 4_026_531_840]
    assert shape.predictor_macs(torch.tensor([1, 129])).tolist() == [0, 128 * (768 * 768 + 2 * 768)]


@pytest.mark.parametrize("task", SCHEDULES)
def test_flops_speedup_of_the_papers_tasks(task: str) -> None:
    """Keep ratios fitted to the paper's padding-free speedups must give them back."""
    shape = EncoderShape.of(BertConfig(), predictor=768)
    texts, found = PAPER["data"][task], PAPER["glue"]["bert"] | PAPER["long"]["bert"]
    length = min(texts["tokens"], texts["padded_to"])
    layers = torch.tensor([[max(1, round(length * ratio))] for ratio in parse_schedule(task, 12)])
    assert shape.flops_speedup(torch.tensor([length]), layers) == pytest.approx(found[task]["speedup"], rel=0.02)


def test_a_last_layer_of_first_tokens_only() -> None:
    """Keys and values of all n tokens, query, output, FFN and attention of one."""
    shape, n, d = EncoderShape(layers=2, hidden=64, ffn=256), 10, 64
    expected = 2 * n * d * d + 2 * d * d + 2 * d * 256 + 2 * n * d
    assert shape.first_token_macs(torch.tensor([n, 0])).tolist() == [expected, 0]
    lengths = torch.tensor([n])
    full, cut = (shape.dense_flops(lengths, first_token_only=only) for only in (False, True))
    assert full - cut == 2 * (int(shape.layer_macs(lengths)) - expected)


def test_skimming_nothing_costs_the_predictors() -> None:
    shape = EncoderShape.of(BertConfig(), predictor=768)
    lengths = torch.full((1,), 256)
    overhead = 1 / shape.flops_speedup(lengths, lengths.expand(12, -1)) - 1
    assert overhead == pytest.approx(0.0792, abs=4e-4)


def test_predictor_size_and_initialisation() -> None:
    predictor = SkimPredictor(768)
    assert sum(p.numel() for p in predictor.parameters()) == 595_202
    assert torch.allclose(predictor.out.bias, torch.tensor([-5.0, 5.0]), atol=0.1)
    assert torch.allclose(predictor(torch.randn(50, 768)), torch.tensor(10.0), atol=3.0)


def test_predictor_logit_is_the_difference_of_two_outputs() -> None:
    predictor = SkimPredictor(32, width=16).double()
    hidden = torch.randn(5, 32, dtype=torch.float64)
    z = predictor.out(torch.nn.functional.gelu(predictor.norm2(predictor.fc(predictor.norm1(hidden)))))
    assert torch.allclose(predictor(hidden), (z[:, 1] - z[:, 0]).float())


@pytest.mark.parametrize(("temperature", "noise"), [(0.1, 1.0), (1.0, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.5])
def test_draws_have_the_sigmoid_as_frequency_at_any_temperature(temperature: float, noise: float, logit: float) -> None:
    torch.manual_seed(0)
    count = 200_000
    draws = straight_through_keep(torch.full((count,), logit), temperature, noise)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    p = 1 / (1 + math.exp(-logit / noise))
    assert draws.mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / count))


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_straight_through_gradient_is_the_soft_decisions(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    noise = torch.tensor([0.3, -1.0, 2.0])
    monkeypatch.setattr("transkimmer.training_forward.logistic_noise", lambda _: noise)
    logit = torch.tensor([0.5, 0.1, -1.0], requires_grad=True)
    drawn = straight_through_keep(logit, 0.7, scale)
    drawn.sum().backward()
    noisy = logit.detach() + scale * noise
    y = torch.sigmoid(noisy / 0.7)
    assert torch.equal(drawn, (noisy > 0).float())
    assert torch.allclose(logit.grad, y * (1 - y) / 0.7)


def test_published_masking_is_a_multiple_of_real_pruning() -> None:
    """Without renormalisation the output is alpha times the pruned one, alpha the probability left on kept keys."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 2, 16)
    keep = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 1.0])
    sequences = PackedSequences(torch.tensor([0, 9], dtype=torch.int32), 9, torch.arange(9) == 0)
    published = keep_attention(q, k, v, keep, sequences, sequences, SkimConfig(skim_attention="published"), REFERENCE)
    pruned = keep_attention(q, k, v, keep, sequences, sequences, SkimConfig(), REFERENCE)
    p = torch.einsum("ihd,jhd->hij", q, k).mul(16**-0.5).softmax(-1)
    alpha = (p * keep).sum(-1).T.unsqueeze(-1)  # [9, 2, 1]
    assert torch.allclose(published, alpha * pruned, atol=1e-6)
    assert alpha.max() < 0.95


@pytest.mark.parametrize("mode", ["renormalized", "published"])
def test_gradient_to_the_keep_weights(mode: str) -> None:
    """Both forms against finite differences, for kept and for skimmed keys."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 7, 2, 8, dtype=torch.float64)
    direction = torch.randn(7, 2, 8, dtype=torch.float64)
    sequences = PackedSequences(torch.tensor([0, 4, 7], dtype=torch.int32), 4, torch.arange(7) % 4 == 0)
    keep = torch.tensor([1, 0.5, 0.25, 1, 1, 0.01, 1], dtype=torch.float64, requires_grad=True)

    def value(weights: torch.Tensor) -> torch.Tensor:
        config = SkimConfig(skim_attention=mode)
        return (keep_attention(q, k, v, weights, sequences, sequences, config, REFERENCE) * direction).sum()

    assert torch.autograd.gradcheck(value, (keep,), eps=1e-6, atol=1e-7)
    # At weight 0 the derivative is one-sided.
    zero = keep.detach().clone()
    zero[1] = 0.0
    zero.requires_grad_()
    (gradient,) = torch.autograd.grad(value(zero), zero)
    step = torch.zeros_like(zero)
    step[1] = 1e-7
    difference = (value(zero.detach() + step) - value(zero.detach())) / 1e-7
    assert gradient[1].item() == pytest.approx(difference.item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (7, 8), (10, 8)], ids=str)
def test_chosen_rows_have_the_values_and_gradients_of_a_mixture(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    hidden, final, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    keep = (torch.rand(shape[:-1]) < 0.5).to(wide)

    def of(choose: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (keep, hidden, final)]
        result = choose(*leaves)
        return [result, *torch.autograd.grad(result, leaves, grad)]

    choose = functools.partial(tk.choose_rows, kernels="reference")
    ours = of(choose)
    mixture = of(lambda k, h, f: torch.lerp(f.to(wide), h.to(wide), k.unsqueeze(-1)).to(dtype))
    assert torch.equal(ours[0], mixture[0])
    for actual, expected in zip(ours[1:], mixture[1:], strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected)
    broken = hidden.clone().fill_(torch.nan)
    assert choose(torch.full_like(keep, torch.nan), broken, final).isnan().all(), "a NaN shows"


@pytest.mark.parametrize("lengths", [(1,), (2, 3), (53, 17, 1, 8), (512, 4)])
def test_schedule_counts_and_spread(lengths: tuple[int, ...]) -> None:
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    batch = Ragged.from_packed(torch.zeros(total, 4), cu_seqlens, max(lengths))
    depth = SchedulePolicy([1.0, 0.5, 0.1], batch, [], REFERENCE).keep.sum(0)
    for start, n in zip(cu_seqlens.tolist(), lengths, strict=False):
        own = depth[start : start + n]
        assert [int((own > layer).sum()) for layer in range(3)] == [n, max(1, round(n * 0.5)), max(1, round(n * 0.1))]
        assert own[0] == 3, "the first token goes through every layer"
        kept = (own > 1).nonzero().flatten()
        assert n < 8 or kept.diff().max() <= 4, "survivors are spread over the sequence"
