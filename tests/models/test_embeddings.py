"""The embeddings of a skimming model are those of the dense one, and by one kernel where that knows how."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transkimmer import add_skimming, remove_skimming

from ..target import Recorder
from .tiny import ARCHITECTURES, KERNELS, config_of, padded_inputs, tiny

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
FUSED = KERNELS[-1] != "reference"


def _both(architecture: str, eps: float | None = None) -> tuple[Any, Any]:
    """(embeddings of a dense model, those of the same model, skimming); `eps` takes the place of their LayerNorm's."""
    dense, skimming = tiny(architecture), tiny(architecture)
    for model in (dense, skimming):
        if eps is not None:
            model.base_model.embeddings.LayerNorm.eps = eps
    add_skimming(skimming, kernels=KERNELS[-1])
    return dense.base_model.embeddings, skimming.base_model.embeddings


def _run(embeddings: nn.Module, **inputs: Tensor) -> tuple[Tensor, bool]:
    """(the result, whether the fused operator made it)."""
    with Recorder() as ran:
        out = embeddings(**inputs)
    return out, any(name == "embed_tokens" for name, _, _ in ran.calls)


def _inputs(architecture: str, kind: str) -> dict[str, Any]:
    ids = padded_inputs()["input_ids"]
    ids[0, -2:] = 1  # RoBERTa's padding, which has no position
    place = torch.arange(ids.size(1), 0, -1)
    given = {
        "plain": {},
        "types": {"token_type_ids": ids % 2},
        "positions": {"position_ids": place.expand_as(ids)},
        "one-row": {"position_ids": place[None]},
        "int32": {"input_ids": ids.int()},
        "embeds": {},
    }[kind]
    if kind == "embeds":
        width = 32 if architecture == "albert" else 64
        return {"input_ids": None, "inputs_embeds": torch.randn(*ids.shape, 2 * width)[..., ::2]}
    return {"input_ids": ids, **given}


@every_architecture
@pytest.mark.parametrize("kind", ["plain", "types", "positions", "one-row", "int32", "embeds"])
@torch.no_grad()
def test_like_the_dense_model(architecture: str, kind: str) -> None:
    if kind == "types" and architecture == "distilbert":
        pytest.skip("DistilBERT knows no token types")
    dense, skimming = _both(architecture)
    inputs = _inputs(architecture, kind)
    out, fused = _run(skimming, **inputs)
    assert fused == FUSED
    torch.testing.assert_close(out, dense(**inputs))


@every_architecture
@torch.no_grad()
def test_with_the_eps_of_their_norm(architecture: str) -> None:
    dense, skimming = _both(architecture, eps=0.3)
    inputs = _inputs(architecture, "plain")
    out, fused = _run(skimming, **inputs)
    assert fused == FUSED
    torch.testing.assert_close(out, dense(**inputs))
    usual = _both(architecture)[0](**inputs)
    assert not torch.allclose(out, usual, rtol=0.1, atol=0.1)


def _hooked(embeddings: Any, seen: list[str]) -> None:
    embeddings.word_embeddings.register_forward_hook(lambda *_: seen.append("called"))


def _dropout_hooked(embeddings: Any, seen: list[str]) -> None:
    embeddings.dropout.register_forward_hook(lambda *_: seen.append("called"))


def _dropout_hooked_in_front(embeddings: Any, seen: list[str]) -> None:
    embeddings.dropout.register_forward_pre_hook(lambda *_: seen.append("called"))


def _adapted(embeddings: Any, seen: list[str]) -> None:
    class Adapted(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            seen.append("called")
            return super().forward(input)

    embeddings.word_embeddings.__class__ = Adapted


def _limited(embeddings: Any, seen: list[str]) -> None:
    embeddings.word_embeddings.max_norm = 0.5


def _norm_without_bias(embeddings: Any, seen: list[str]) -> None:
    embeddings.LayerNorm = nn.LayerNorm(64, bias=False)


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (_hooked, 1),
        (_dropout_hooked, 1),
        (_dropout_hooked_in_front, 1),
        (_adapted, 1),
        (_limited, 0),
        (_norm_without_bias, 0),
    ],
)
@torch.no_grad()
def test_what_the_kernel_does_not_know_is_hugging_faces(change: Callable[[Any, list[str]], None], calls: int) -> None:
    dense, skimming = _both("bert")
    seen: list[str] = []
    for embeddings in (dense, skimming):
        change(embeddings, seen)
    out, fused = _run(skimming, **_inputs("bert", "plain"))
    assert not fused and len(seen) == calls
    assert torch.equal(out, dense(**_inputs("bert", "plain")))


@pytest.mark.parametrize("how", ["training", "gradients", "autocast", "both"])
def test_so_are_training_gradients_autocast_and_embeddings_beside_ids(how: str) -> None:
    dense, skimming = _both("distilbert" if how == "both" else "bert")  # which takes ids then
    inputs = _inputs("bert", "plain")
    if how == "both":
        inputs["inputs_embeds"] = torch.randn(4, 14, 64)
    around = torch.autocast("cpu", torch.bfloat16) if how == "autocast" else contextlib.nullcontext()
    for embeddings in (dense, skimming):
        embeddings.train(how == "training").dropout.p = 0.0
    with torch.set_grad_enabled(how == "gradients"), around:
        out, fused = _run(skimming, **inputs)
        assert not fused
        assert torch.equal(out, dense(**inputs))
        assert out.requires_grad == (how == "gradients")


@torch.no_grad()
def test_errors_are_hugging_faces() -> None:
    both = _both("bert")
    positions = config_of("bert").max_position_embeddings
    for inputs in (
        {"input_ids": torch.ones(1, positions + 1).long()},
        {"input_ids": torch.ones(2, 3).long(), "position_ids": torch.ones(3, 3).long()},
        {"input_ids": torch.ones(2, 3)},
        {"inputs_embeds": torch.ones(2, 3, 5)},
        {"input_ids": torch.ones(3).long()},
    ):
        raised = []
        for embeddings in both:
            with pytest.raises((RuntimeError, IndexError, ValueError)) as caught:
                embeddings(**inputs)
            raised.append((caught.type, str(caught.value)))
        assert raised[0] == raised[1]


@every_architecture
def test_taken_off_again(architecture: str) -> None:
    model: PreTrainedModel = add_skimming(tiny(architecture))
    names = [name for name, _ in remove_skimming(model).named_modules()]
    dense = tiny(architecture)
    assert type(model.base_model.embeddings) is type(dense.base_model.embeddings)
    assert vars(model.base_model.embeddings).keys() == vars(dense.base_model.embeddings).keys()
    assert names == [name for name, _ in dense.named_modules()]
