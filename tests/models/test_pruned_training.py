"""Pruned training: the values of the unpruned training forward, and its gradients but for what later layers say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transkimmer import SkimConfig, add_skimming, record_skimming
from transkimmer.policies import logistic_noise
from transkimmer.records import SkimRecord
from transkimmer.skimming import skimming_of
from transkimmer.training_forward import (
    LayerDecisions,
    PackedSequences,
    TrainingEncoder,
    TrainingResult,
    decisions_without_noise,
    straight_through_keep,
)

from ..target import Recorder
from .tiny import ARCHITECTURES, KERNELS, LAYERS, no_dropout, padded_inputs, real_rows, relative_error, tiny
from .tiny import undecided_predictors as undecided

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_kernels = pytest.mark.parametrize("kernels", KERNELS)
every_head = pytest.mark.parametrize("head", ["sequence", "qa", None], ids=["sequence", "qa", "states"])
slow_in_triton = pytest.mark.default_kernels("a step takes half a minute in Triton's interpreter; two are taken there")
LENGTHS = (9, 1, 14, 5)

Forward = tuple[Tensor, Tensor, dict[str, Tensor], SkimRecord]


def oracle(encoder: TrainingEncoder, hidden: Tensor, sequences: PackedSequences) -> TrainingResult:
    """The unpruned forward in which a skimmed token's keep weight is a constant 0 after the layer that skims it."""
    keep, final = torch.ones(hidden.size(0)), hidden
    rows, result = torch.arange(hidden.size(0), dtype=torch.int32), TrainingResult(hidden, [])
    assert encoder.predictors is not None
    for layer, predictor in zip(encoder.layers, encoder.predictors, strict=True):
        logit = predictor(hidden)
        decided = torch.where(sequences.first, 1.0, straight_through_keep(logit, encoder.config.temperature))
        keep = torch.where(keep.detach() > 0.5, keep * decided, 0.0)
        hidden = encoder._layer(layer, hidden, sequences, hidden, keep, sequences)
        final = torch.lerp(final, hidden, keep.unsqueeze(-1))
        result.layers.append(LayerDecisions(rows, sequences.cu_seqlens, keep, logit))
    result.hidden = final
    return result


class TokenNoise:
    """Draws for `logistic_noise` that belong to a token and a layer, whoever else is present."""

    def __init__(self, first: Tensor) -> None:
        self.noise = [logistic_noise(first.float()) for _ in range(LAYERS)]
        self.first, self.present = first, torch.arange(first.numel())
        self.pruned_from: list[int] = []

    def __call__(self, logit: Tensor) -> Tensor:
        noise = self.noise.pop(0)
        if logit.numel() == noise.numel():
            self.present = torch.arange(noise.numel())
        else:
            self.pruned_from.append(logit.numel())
        noise = noise[self.present]
        self.present = self.present[(logit + noise > 0) | self.first[self.present]]
        return noise


def skimming(architecture: str, head: str | None, kernels: str = "auto", **settings: object) -> PreTrainedModel:
    model = add_skimming(no_dropout(tiny(architecture, head)), SkimConfig(**settings), kernels=kernels)
    undecided(model)
    return model.train()


def forward(model: PreTrainedModel, inputs: dict[str, Tensor], noise: bool = False) -> Forward:
    """A training step: (what is read out of the real tokens, loss, gradients by parameter, record)."""
    mask = inputs.get("attention_mask", torch.ones(1, inputs["input_ids"].size(1)))
    with pytest.MonkeyPatch.context() as patch, record_skimming() as records:
        if noise:
            torch.manual_seed(5)
            first = torch.zeros(int(mask.sum()), dtype=torch.bool)
            lengths = mask.sum(1)[mask.sum(1) > 0]
            first[(lengths.cumsum(0) - lengths).long()] = True
            patch.setattr("transkimmer.training_forward.logistic_noise", TokenNoise(first))
            output = model(**inputs)
        else:
            with decisions_without_noise(0.0):
                output = model(**inputs)
    read = torch.cat([real_rows(part, mask).flatten() for part in output.to_tuple() if part.dtype == torch.float32])
    torch.manual_seed(6)
    loss = (read * torch.randn(read.shape)).mean() + skimming_of(model).config.skim_weight * records[0].skim_loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return read.detach(), loss.detach(), gradients, records[0]


def expect_equal(actual: Forward, expected: Forward, *, gradients: bool = True, none: Sequence[str] = ()) -> None:
    """none: parts of the names of parameters whose gradients are nothing but rounding, no share of anything."""
    assert relative_error(actual[0], expected[0]) <= 1e-5
    assert actual[1].item() == pytest.approx(expected[1].item(), rel=1e-5)
    assert torch.equal(actual[3].keep_masks, expected[3].keep_masks)
    assert actual[3].skim_loss.item() == pytest.approx(expected[3].skim_loss.item(), rel=1e-6)
    if gradients:
        assert list(actual[2]) == list(expected[2])
        scale = max(gradient.abs().max() for gradient in expected[2].values())
        for name, gradient in expected[2].items():
            if any(part in name for part in none):
                assert max(gradient.abs().max(), actual[2][name].abs().max()) <= 1e-6 * scale, name
                continue
            assert (actual[2][name] - gradient).abs().max() <= 2e-5 * max(gradient.abs().max(), 1e-2 * scale), name


def oracle_forward(model: PreTrainedModel, inputs: dict[str, Tensor], noise: bool = False) -> Forward:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingEncoder, "run", oracle)
        return forward(model, inputs, noise)


@every_architecture
@every_head
@pytest.mark.parametrize("noise", [False, True], ids=["threshold", "drawn"])
@slow_in_triton
def test_gradients_are_those_without_later_layers(architecture: str, head: str | None, noise: bool) -> None:
    """And values those of the unpruned forward. That the gradients are others than its own, the last lines show."""
    inputs = padded_inputs(LENGTHS)
    pruned = forward(skimming(architecture, head, pruned_training=True), inputs, noise)
    expect_equal(pruned, oracle_forward(skimming(architecture, head), inputs, noise))
    unpruned = forward(skimming(architecture, head), inputs, noise)
    expect_equal(pruned, unpruned, gradients=False)
    kept = pruned[3].layer_lengths.sum(1).tolist()
    assert sum(LENGTHS) > kept[1] > len(LENGTHS), "there must be somebody to remove, and somebody to miss them"
    predictors = [name for name in pruned[2] if "skim_predictors" in name]
    assert max(relative_error(pruned[2][name], unpruned[2][name]) for name in predictors) > 1e-2


@every_kernels
@pytest.mark.parametrize("head", ["sequence", "qa"])
def test_on_all_kernels(kernels: str, head: str) -> None:
    model = skimming("bert", head, kernels, pruned_training=True)
    with Recorder() as ran:
        pruned = forward(model, padded_inputs(LENGTHS))
    assert {backend for _, backend, _ in ran.calls} == {kernels}
    expect_equal(pruned, oracle_forward(skimming("bert", head, "reference"), padded_inputs(LENGTHS)))


def _packed(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    inputs = padded_inputs(lengths)
    ids = inputs["input_ids"][inputs["attention_mask"].bool()]
    return {"input_ids": ids[None], "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}


@pytest.mark.parametrize(
    "inputs",
    [padded_inputs(LENGTHS, side="left"), _packed(LENGTHS), padded_inputs((0, 7, 0)), padded_inputs((1, 1))],
    ids=["left", "packed", "empty sequences", "one token each"],
)
@slow_in_triton
def test_all_inputs(inputs: dict[str, Tensor]) -> None:
    pruned = forward(skimming("bert", None, pruned_training=True), inputs)
    expect_equal(pruned, oracle_forward(skimming("bert", None), inputs))
    expect_equal(pruned, forward(skimming("bert", None), inputs), gradients=False)


@slow_in_triton
def test_a_batch_without_tokens() -> None:
    model = skimming("bert", None, pruned_training=True)
    states = model(input_ids=torch.ones(2, 3, dtype=torch.long), attention_mask=torch.zeros(2, 3)).last_hidden_state
    assert states.shape == (2, 3, 64) and states.isfinite().all()


def _biased(model: PreTrainedModel, layer: int, bias: float) -> PreTrainedModel:
    with torch.no_grad():
        model.skimming.predictors[layer].out.bias[1] += bias
    return model


@pytest.mark.parametrize("head", ["sequence", "qa"])
@pytest.mark.parametrize("layer", range(LAYERS))
@slow_in_triton
def test_layers_that_only_first_tokens_reach(head: str, layer: int) -> None:
    inputs = padded_inputs(LENGTHS)
    pruned = forward(_biased(skimming("bert", head, pruned_training=True), layer, -1e3), inputs)
    # A softmax over a single key is constant.
    none = [f"layer.{i}.attention.self.{part}." for i in range(layer, LAYERS) for part in ("query", "key")]
    expect_equal(pruned, oracle_forward(_biased(skimming("bert", head), layer, -1e3), inputs), none=none)
    assert pruned[3].layer_lengths[layer:].eq(1).all()


@slow_in_triton
def test_nothing_moves_where_nothing_is_skimmed() -> None:
    counts = []
    for kept_by in (0, LAYERS):
        model = skimming("bert", "qa", pruned_training=True)
        for layer in range(kept_by):
            _biased(model, layer, 1e3)
        with Recorder() as ran:
            forward(model, padded_inputs(LENGTHS))
        counts.append(sum(name in ("gather_rows", "scatter_rows") for name, _, _ in ran.calls))
    assert counts[0] > 0 and counts[1] == 0


@pytest.mark.parametrize("head", ["sequence", "qa"])
@slow_in_triton
def test_skimmed_tokens_are_gone(head: str) -> None:
    """From the next layer on; where only the first token is read, from the layer's own FFN on."""
    model = skimming("bert", head, pruned_training=True)
    rows: dict[str, list[int]] = {"predictor": [], "key": [], "ffn": []}

    def note(kind: str) -> Callable[..., None]:
        return lambda module, inputs, output: rows[kind].append(inputs[0].size(0))

    for predictor, layer in zip(model.skimming.predictors, model.bert.encoder.layer, strict=True):
        predictor.register_forward_hook(note("predictor"))
        layer.attention.self.key.register_forward_hook(note("key"))
        layer.intermediate.dense.register_forward_hook(note("ffn"))
    kept = forward(model, padded_inputs(LENGTHS))[3].layer_lengths.sum(1).tolist()
    reached = [sum(LENGTHS), *kept[:-1]]
    assert rows == {"predictor": reached, "key": reached, "ffn": kept if head == "sequence" else reached}


@pytest.mark.parametrize("head", ["sequence", "qa"])
@slow_in_triton
def test_gradient_checkpointing_changes_nothing(head: str) -> None:
    model = skimming("bert", head, pruned_training=True)
    plain = forward(model, padded_inputs(LENGTHS), noise=True)
    model.gradient_checkpointing_enable()
    expect_equal(forward(model, padded_inputs(LENGTHS), noise=True), plain)


@every_architecture
@pytest.mark.parametrize("head", ["sequence", "qa"])
@slow_in_triton
def test_in_bf16_autocast(architecture: str, head: str) -> None:
    """Values as without pruning in the sequences that no rounding has decided; all gradients are finite."""
    inputs, found = padded_inputs(LENGTHS), []
    for pruned in (True, False):
        model = skimming(architecture, head, pruned_training=pruned)
        with torch.autocast("cpu", torch.bfloat16), record_skimming() as records, decisions_without_noise(0.0):
            output = model(**inputs)
        read = torch.stack([part.float() for part in output.to_tuple()], 1)
        (read.mean() + records[0].skim_loss).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        found.append((read.detach().flatten(1), records[0].keep_masks))
    (actual, decided), (expected, others) = found
    alike = (decided == others).all(0).all(1)  # [batch]
    assert alike.double().mean() >= 0.5 and not decided[-1].equal(decided[0])
    assert relative_error(actual[alike], expected[alike]) <= 0.05
