"""The invariant of the package: training forward == pruned inference == the dense model when nothing is skimmed."""

from __future__ import annotations

import copy

import pytest
import torch
from transkimmer import SkimConfig, add_skimming, record_skimming, remove_skimming
from transkimmer.architectures import architecture_of, encoder_of, get
from transkimmer.data import positions_of
from transkimmer.training_forward import decisions_without_noise

from .tiny import (
    ARCHITECTURES,
    HEADS,
    KERNELS,
    LAYERS,
    ROBERTAS,
    main_output,
    no_dropout,
    padded_inputs,
    real_rows,
    relative_error,
    tiny,
    undecided_predictors,
)

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
every_kernels = pytest.mark.parametrize("kernels", KERNELS)


@every_architecture
@pytest.mark.parametrize("head", HEADS)
@every_kernels
@torch.no_grad()
def test_keep_all_equals_the_dense_model(architecture: str, head: str, kernels: str) -> None:
    model = tiny(architecture, head)
    inputs = padded_inputs(choices=2 if head == "choice" else 0)
    dense = model(**inputs)
    skimming = add_skimming(model, kernels=kernels)(**inputs)
    assert type(skimming) is type(dense)
    assert set(model.skimming.serves.values()) == {kernels}
    expected, actual = (real_rows(main_output(x), inputs["attention_mask"]) for x in (dense, skimming))
    assert relative_error(actual, expected) <= 1e-5


@every_architecture
@every_kernels
@torch.no_grad()
def test_every_layer_norm_keeps_its_own_eps(architecture: str, kernels: str) -> None:
    """All of them differ, and none is what Hugging Face has by default."""
    model = no_dropout(tiny(architecture))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    for i, norm in enumerate(norms):
        norm.eps = 0.1 * (i + 1)
    assert len(norms) >= 3
    inputs = padded_inputs()
    dense = real_rows(model(**inputs).last_hidden_state, inputs["attention_mask"])
    add_skimming(model, kernels=kernels)
    for training in (False, True):
        with decisions_without_noise(0.0):
            output = model.train(training)(**inputs).last_hidden_state
        assert relative_error(real_rows(output, inputs["attention_mask"]), dense) <= 2e-5


@pytest.mark.parametrize("groups", [2, 3])
@torch.no_grad()
def test_a_layer_is_that_of_its_group(groups: int) -> None:
    """ALBERT applies the layers of a group again and again before it goes on to the next; two share three unevenly."""
    model = tiny("albert", num_hidden_groups=groups)
    inputs = padded_inputs()
    dense = model(**inputs).last_hidden_state
    layers = architecture_of(model).layers(encoder_of(model))
    assert len(layers) == LAYERS and len(set(map(id, layers))) == groups
    skimming = add_skimming(model)(**inputs).last_hidden_state
    mask = inputs["attention_mask"]
    assert relative_error(real_rows(skimming, mask), real_rows(dense, mask)) <= 1e-5


@pytest.mark.parametrize("architecture", [name for name in ROBERTAS if name != "roberta"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_copies_of_roberta_skim_as_it_does(architecture: str, head: str, training: bool) -> None:
    """Hugging Face has a copy of RoBERTa's code for each; those who take the place of a part must know them all."""
    original, copied = (no_dropout(add_skimming(tiny(name, head))) for name in ("roberta", architecture))
    undecided_predictors(original)
    copied.load_state_dict(original.state_dict())
    assert positions_of(copied.config) == positions_of(original.config) == original.config.max_position_embeddings - 2
    outputs = []
    for model in (original, copied):
        torch.manual_seed(3)
        with record_skimming() as records:
            outputs.append(main_output(model.train(training)(**padded_inputs(choices=2 if head == "choice" else 0))))
        assert 0.1 < records[0].tokens_kept[-1] < 0.9
    assert type(copied).__name__.lower().startswith(architecture.replace("-", "")) and torch.equal(*outputs)


@every_architecture
@every_kernels
@torch.no_grad()
def test_keep_all_in_bf16_errs_no_more_than_the_dense_model(architecture: str, kernels: str) -> None:
    model = tiny(architecture)
    inputs = padded_inputs()
    exact = model.double()(**inputs).last_hidden_state
    half = model.bfloat16()(**inputs).last_hidden_state.double()
    ours = add_skimming(model, kernels=kernels)(**inputs).last_hidden_state.double()
    exact, half, ours = (real_rows(x, inputs["attention_mask"]) for x in (exact, half, ours))
    assert (ours - exact).abs().max() <= 2 * (half - exact).abs().max()


@every_architecture
@every_kernels
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_training_forward_equals_pruned_inference(
    architecture: str, kernels: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise set to zero, a training forward decides as inference does; every real row must then agree."""
    monkeypatch.setattr("transkimmer.training_forward.logistic_noise", torch.zeros_like)
    model = no_dropout(add_skimming(tiny(architecture), kernels=kernels))
    undecided_predictors(model)
    inputs = padded_inputs(side=side)
    with record_skimming() as records:
        pruned = model.eval()(**inputs).last_hidden_state
        masked = model.train()(**inputs).last_hidden_state
    mask = inputs["attention_mask"]
    assert relative_error(real_rows(masked, mask), real_rows(pruned, mask)) <= 2e-5
    assert relative_error(masked[:, 0], pruned[:, 0]) <= 2e-5, "what heads pool from"
    assert torch.equal(records[0].keep_masks, records[1].keep_masks)
    kept = records[0].tokens_kept
    assert 0.1 < kept[-1] < 0.9, "the test must skim some tokens, and keep some"


@every_architecture
@torch.no_grad()
def test_in_training_a_head_reads_the_first_token_behind_the_padding(architecture: str) -> None:
    """Without position embeddings it does not matter where a row begins."""
    model = no_dropout(add_skimming(tiny(architecture, "sequence"))).train()
    undecided_predictors(model)
    model.base_model.embeddings.position_embeddings.weight.zero_()
    right, left = padded_inputs(), padded_inputs(side="left")
    left["input_ids"][left["attention_mask"].bool()] = right["input_ids"][right["attention_mask"].bool()]
    with decisions_without_noise(0.0), record_skimming() as records:
        expected, actual = (model(**inputs).logits for inputs in (right, left))
    assert relative_error(actual, expected) <= 2e-5
    assert 0.1 < records[0].tokens_kept[-1] < 0.9


@every_architecture
@torch.no_grad()
def test_pruned_inference_equals_the_dense_layers_on_the_survivors(architecture: str) -> None:
    """Against a padded computation with Hugging Face's own layers, the survivors' mask renormalised by -inf scores."""
    dense = tiny(architecture)
    model = add_skimming(copy.deepcopy(dense))
    undecided_predictors(model)
    inputs = padded_inputs()
    with record_skimming() as records:
        pruned = model(**inputs).last_hidden_state
    expected = _masked_dense(dense, inputs, records[0].keep_masks)
    mask = inputs["attention_mask"]
    assert relative_error(real_rows(pruned, mask), real_rows(expected, mask)) <= 2e-5


def _masked_dense(dense: torch.nn.Module, inputs: dict[str, torch.Tensor], keep: torch.Tensor) -> torch.Tensor:
    architecture, encoder = architecture_of(dense), encoder_of(dense)
    hidden = dense.base_model.embeddings(inputs["input_ids"])
    if architecture.input_projection is not None:
        hidden = get(encoder, architecture.input_projection)(hidden)
    for layer, mask in zip(architecture.layers(encoder), keep, strict=True):
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None, :]
        output = layer(hidden, bias)
        output = output[0] if isinstance(output, tuple) else output
        hidden = torch.where(mask.unsqueeze(-1), output, hidden)
    return hidden


@every_architecture
@every_kernels
@torch.no_grad()
def test_computing_only_the_first_token_in_the_last_layer_is_exact(architecture: str, kernels: str) -> None:
    model = add_skimming(tiny(architecture, "sequence"), kernels=kernels)
    undecided_predictors(model)
    inputs = padded_inputs()
    assert model.skimming.first_token_only
    short = model(**inputs).logits
    model.skimming.first_token_only = False
    assert relative_error(short, model(**inputs).logits) <= 1e-5


def test_only_heads_that_read_the_first_token_are_cut_short() -> None:
    cut = {head: add_skimming(tiny("bert", head)).skimming.first_token_only for head in HEADS}
    assert cut == {"sequence": True, "token": False, "qa": False, "mlm": False, "choice": True}
    assert not add_skimming(tiny("bert")).skimming.first_token_only


@torch.no_grad()
def test_skimmed_tokens_keep_the_state_in_which_they_left() -> None:
    model = add_skimming(tiny("bert"))
    undecided_predictors(model)
    inputs = padded_inputs()
    embeddings = model.embeddings(inputs["input_ids"])
    with record_skimming() as records:
        output = model(**inputs).last_hidden_state
    never = inputs["attention_mask"].bool() & ~records[0].keep_masks[0]
    assert never.any()
    assert torch.equal(output[never], embeddings[never])


@every_architecture
@torch.no_grad()
def test_removing_skimming_restores_the_model(architecture: str) -> None:
    model = tiny(architecture, "token")
    inputs = padded_inputs()
    names, before, attention = list(model.state_dict()), model(**inputs).logits, model.config._attn_implementation
    remove_skimming(add_skimming(model))
    assert list(model.state_dict()) == names
    assert torch.equal(model(**inputs).logits, before)
    assert model.config._attn_implementation == attention
    fresh = tiny(architecture, "token")
    parts = (lambda x: x, encoder_of, lambda x: x.base_model.embeddings, lambda x: x.config)
    for left, original in ((part(model), part(fresh)) for part in parts):
        assert type(left) is type(original) and vars(left).keys() == vars(original).keys()
    assert not model._forward_hooks and not model._forward_pre_hooks


@torch.no_grad()
def test_switched_off_it_is_the_dense_model() -> None:
    model = tiny("bert")
    inputs = padded_inputs()
    dense = real_rows(model(**inputs).last_hidden_state, inputs["attention_mask"])
    add_skimming(model)
    undecided_predictors(model)
    model.skimming.enabled = False
    for mode in (False, True):
        output = no_dropout(model).train(mode)(**inputs).last_hidden_state
        assert relative_error(real_rows(output, inputs["attention_mask"]), dense) <= 1e-5


@torch.no_grad()
def test_a_schedule_keeps_the_scheduled_counts() -> None:
    ratios = [0.75, 0.5, 0.2]
    model = add_skimming(tiny("bert"), SkimConfig(schedule=ratios))
    lengths = (12, 1, 40, 7)
    with record_skimming() as records:
        model(**padded_inputs(lengths))
    expected = [[max(1, round(n * ratio)) for n in lengths] for ratio in ratios]
    assert records[0].layer_lengths.tolist() == expected
    masks = records[0].keep_masks
    assert masks[:, :, 0].all(), "the first token always stays"
    assert all((masks[i + 1] <= masks[i]).all() for i in range(LAYERS - 1)), "a skimmed token never returns"
