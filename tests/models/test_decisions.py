"""Which tokens are kept: by a draw at inference, and by a threshold in training as at inference."""

from __future__ import annotations

import pytest
import torch
from transkimmer import SkimConfig, add_skimming, record_skimming
from transkimmer.policies import logistic_noise
from transkimmer.training_forward import decisions_without_noise

from .tiny import KERNELS, LAYERS, no_dropout, padded_inputs, real_rows, relative_error, tiny, undecided_predictors

every_kernels = pytest.mark.parametrize("kernels", KERNELS)


@every_kernels
@pytest.mark.default_kernels("thousands of tokens take half a minute in Triton's interpreter")
@pytest.mark.parametrize("threshold", [0.3, 0.7])
@torch.no_grad()
def test_draws_keep_a_share_that_logit_and_threshold_say(threshold: float, kernels: str) -> None:
    """Of the tokens that reach a layer, anew in each; first tokens aside, which always stay."""
    model = add_skimming(tiny("bert"), SkimConfig(decision="sample", threshold=threshold), kernels=kernels)
    for predictor in model.skimming.predictors:
        predictor.out.weight.zero_()
        predictor.out.bias.copy_(torch.tensor([0.1, 0.5]))  # skim, keep
    with record_skimming() as records:
        model(**padded_inputs((61,) * 60))
    kept = (records[0].layer_lengths - 1).sum(1)
    probability = torch.tensor(0.4 - model.skimming.config.logit_threshold).sigmoid().item()
    for layer, reached in zip(range(LAYERS), (60 * 60, *kept.tolist()), strict=False):
        sigma = (probability * (1 - probability) / reached) ** 0.5
        assert abs(kept[layer].item() / reached - probability) <= 5 * sigma


@every_kernels
@pytest.mark.parametrize("threshold", [0.3, 0.7])
@torch.no_grad()
def test_without_noise_training_keeps_what_inference_keeps(threshold: float, kernels: str) -> None:
    model = no_dropout(add_skimming(tiny("bert"), SkimConfig(threshold=threshold), kernels=kernels))
    undecided_predictors(model)
    inputs = padded_inputs()
    with record_skimming() as records:
        pruned = model(**inputs).last_hidden_state
        with decisions_without_noise(model.skimming.config.logit_threshold):
            masked = model.train()(**inputs).last_hidden_state
        with decisions_without_noise(0.0):
            model(**inputs)
    inference, training, argmax = (record.keep_masks for record in records)
    assert torch.equal(training, inference) and not torch.equal(training, argmax)
    mask = inputs["attention_mask"]
    assert relative_error(real_rows(masked, mask), real_rows(pruned, mask)) <= 2e-5


@every_kernels
@pytest.mark.parametrize("threshold", [0.3, 0.5])
@torch.no_grad()
def test_a_logit_at_the_threshold_stays(threshold: float, kernels: str) -> None:
    model = no_dropout(add_skimming(tiny("bert"), SkimConfig(threshold=threshold, noise=0.0), kernels=kernels))
    at = model.skimming.config.logit_threshold
    for predictor in model.skimming.predictors:
        predictor.out.weight.zero_()
        predictor.out.bias.copy_(torch.tensor([0.0, at]))  # skim, keep
    with record_skimming() as records:
        model(**padded_inputs())
        with decisions_without_noise(at):
            model.train()(**padded_inputs())
        if threshold == 0.5:  # which draws without noise know
            model(**padded_inputs())
    assert all(record.tokens_kept.tolist() == [1.0] * LAYERS for record in records)


@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-24])
def test_noise_is_finite_at_either_end_of_a_draw(drawn: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite noise would become NaN where it is scaled by 0; and in half precision the upper end is 1."""
    monkeypatch.setattr(torch, "rand_like", lambda x, **options: torch.full_like(x, drawn, **options))
    assert logistic_noise(torch.zeros(3, dtype=torch.bfloat16)).isfinite().all()
