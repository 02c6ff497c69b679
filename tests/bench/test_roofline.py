"""FLOPs and bytes under a roofline against closed forms, and the probe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transkimmer.bench import roofline
from transkimmer.bench.roofline import Ceilings, Work, encoder_work
from transkimmer.flops import EncoderShape
from transkimmer.predictor import SkimPredictor

from ..models.tiny import config_of, tiny

BERT_BASE = EncoderShape(layers=12, hidden=768, ffn=3072, predictor=768)


def test_parameters_of_bert_base() -> None:
    assert roofline.layer_parameters(BERT_BASE) == 7_087_872
    # Of 595,202 (Transkimmer, section 4.3), inference needs the last product's two rows as one.
    assert roofline.predictor_parameters(BERT_BASE) == 595_202 - 769


def test_parameters_are_those_of_the_modules() -> None:
    layer = tiny("bert").encoder.layer[0]
    shape = EncoderShape.of(config_of("bert"), predictor=24)
    assert roofline.layer_parameters(shape) == sum(p.numel() for p in layer.parameters())
    predictor = SkimPredictor(64, 24)
    assert roofline.predictor_parameters(shape) == sum(p.numel() for p in predictor.parameters()) - 24 - 1


def test_work_of_a_dense_encoder() -> None:
    lengths = torch.tensor([128, 128])
    work = encoder_work(BERT_BASE, lengths, lengths.expand(12, -1), itemsize=2)
    macs = 931_135_488  # of a layer on 128 tokens: 12 n d^2 + 2 n^2 d
    assert work.flops == 12 * (2 * 2 * macs,)
    assert work.moved == 12 * (2 * (7_087_872 + 2 * 256 * 768),)  # weights once, every row in and out


def test_work_of_a_skimming_encoder() -> None:
    shape = EncoderShape(layers=2, hidden=8, ffn=16, predictor=4)
    lengths, layers = torch.tensor([5, 3]), torch.tensor([[4, 2], [2, 1]])
    work = encoder_work(shape, lengths, layers, 4, first_token_only=True, predictors=True)
    layer, predictor = 4 * 64 + 2 * 8 * 16 + 9 * 8 + 16, 4 * 8 + 2 * 8 + 4 * 4 + 1
    assert work.moved == (
        4 * (predictor + 8 * 8),  # all eight that arrive
        4 * (layer + (6 + 6) * 8),
        4 * (predictor + 6 * 8),
        4 * (layer + (3 + 2) * 8),  # three are read, the two first ones are written
    )
    assert sum(work.flops) == shape.skimming_flops(lengths, layers, first_token_only=True)
    dense = encoder_work(shape, lengths, lengths.expand(2, -1), 4)
    assert sum(dense.flops) == shape.dense_flops(lengths) and len(dense.flops) == 2


def test_each_step_takes_the_longer_of_its_two_times() -> None:
    ceilings = Ceilings(bytes_per_s=10.0, flops_per_s=100.0)
    assert Work((100, 1000), (50, 10)).bound_s(ceilings) == 5 + 10
    assert (Work((100,), (50,)) + Work((1000,), (10,))).bound_s(ceilings) == 15
    assert ceilings.highest(Ceilings(5.0, 300.0)) == Ceilings(10.0, 300.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a quarter of a GiB, to and fro, and a product of three sizes, if each took half a second."""

    def best_seconds(run: Callable[[], object], device: str) -> float:
        run()
        return 0.5

    monkeypatch.setattr(roofline, "best_seconds", best_seconds)
    assert roofline.measure_ceilings("cpu", dtype) == Ceilings(2 * 2**28 / 0.5, 2 * 512 * 1024 * 2048 / 0.5)


def test_the_best_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.4, 1.0, 1.1, 2.0, 2.9])  # calls of 0.4, 0.1 and 0.9 seconds
    monkeypatch.setattr(roofline, "_PROBE_SECONDS", 1.0)
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert roofline.best_seconds(lambda: None, "cpu") == pytest.approx(0.1)


@pytest.mark.parametrize("times", [[0.5, 0.5, 0.5, 0.25], [1.0, 0.25, 0.25, 0.5]])
def test_the_ceiling_is_the_better_product(times: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's or ours, and of a copy and a read the faster one by bytes."""
    taken = iter(times)
    monkeypatch.setattr(roofline, "best_seconds", lambda run, device: next(taken))
    found = roofline.measure_ceilings("cpu", torch.float32)
    assert found == roofline.Ceilings(2**28 / 0.25, 2 * 512 * 1024 * 2048 / 0.25) and not list(taken)
