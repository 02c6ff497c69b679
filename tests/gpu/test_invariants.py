"""On the device: training forward == pruned inference == the dense model when nothing is skimmed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transkimmer import add_skimming, record_skimming

from .conftest import EVERYWHERE, Place, dtypes, inputs, skimming_bert, small_bert

LENGTHS = (65, 1, 17, 96, 2, 40, 33)
everywhere = pytest.mark.parametrize("place", EVERYWHERE, ids=str)
pruned_or_not = pytest.mark.parametrize("pruned_training", [False, True], ids=["every token", "pruned training"])


def _states(place: Place, dtype: torch.dtype, **batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Real rows of the dense model in fp64 and in `dtype`, and of the keep-all skimming one."""
    real = batch["attention_mask"].bool()
    exact = small_bert(torch.float64, place.device)(**batch).last_hidden_state
    plain = small_bert(dtype, place.device)(**batch).last_hidden_state
    ours = add_skimming(small_bert(dtype, place.device), kernels=place.kernels)(**batch).last_hidden_state
    return exact[real], plain[real].double(), ours[real].double()


@dtypes
@everywhere
@torch.no_grad()
def test_keep_all_errs_no_more_than_the_dense_model(place: Place, dtype: torch.dtype) -> None:
    place.require(dtype)
    exact, plain, ours = _states(place, dtype, **inputs(LENGTHS, place.device))
    for kind in (torch.amax, torch.mean):
        assert kind((ours - exact).abs(), (0, 1)) <= 2 * kind((plain - exact).abs(), (0, 1))


@dtypes
@everywhere
@pruned_or_not
@torch.no_grad()
def test_training_forward_equals_pruned_inference(
    place: Place, dtype: torch.dtype, pruned_training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise set to zero, a training forward decides as inference does.

    In bf16 a logit beside the threshold may fall to either side; sequences that this happened to are left out, and
    few may be.
    """
    place.require(dtype)
    monkeypatch.setattr("transkimmer.training_forward.logistic_noise", torch.zeros_like)
    model, batch = skimming_bert(place, dtype), inputs(LENGTHS, place.device)
    model.skimming.config.pruned_training = pruned_training
    with record_skimming() as records:
        pruned = model.eval()(**batch).last_hidden_state
        masked = model.train()(**batch).last_hidden_state
    kept = records[0].tokens_kept
    assert kept[0] < 0.9 and kept[-1] > len(LENGTHS) / sum(LENGTHS), "the test must skim some tokens, and keep some"
    alike = (records[0].keep_masks == records[1].keep_masks).all(0).all(1).to(place.device)  # [batch]
    assert alike.all() if dtype == torch.float32 else alike.double().mean() >= 0.5
    real = batch["attention_mask"].bool() & alike[:, None]
    largest = pruned[real].double().abs().max()
    error = (masked[real].double() - pruned[real].double()).abs().max() / largest
    # Two orders of summation over four layers: on a CPU they are 9 units of fp32 apart, and 2 of bf16.
    assert error <= (64 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps


@dtypes
@everywhere
@pruned_or_not
def test_a_training_step_has_finite_gradients_everywhere(
    place: Place, dtype: torch.dtype, pruned_training: bool
) -> None:
    """And the same ones twice: nothing is summed up in an order left to chance."""
    place.require(dtype)
    model, batch = skimming_bert(place, dtype).train(), inputs(LENGTHS, place.device)
    model.skimming.config.pruned_training = pruned_training
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        model.zero_grad()
        model(**batch).last_hidden_state[batch["attention_mask"].bool()].square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == sum(1 for _ in model.parameters())
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all(), name
        # PyTorch's own embedding backward adds atomically.
        assert "embeddings" in name or torch.equal(gradient, gradients[1][name]), name
