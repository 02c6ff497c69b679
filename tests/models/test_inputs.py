"""Everything a Hugging Face encoder may be fed: padding on either side, packed rows, embeddings, odd batches."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening
from transkimmer import add_skimming, record_skimming

from .tiny import (
    ARCHITECTURES,
    LAYERS,
    VOCABULARY,
    no_dropout,
    padded_inputs,
    real_rows,
    relative_error,
    tiny,
    undecided_predictors,
)

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def _one_by_one(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Last hidden state of each sequence alone, unpadded."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    return [model(input_ids=row[real].unsqueeze(0)).last_hidden_state[0] for row, real in zip(ids, mask, strict=True)]


@every_architecture
@torch.no_grad()
def test_a_sequence_does_not_depend_on_its_batch_mates(architecture: str) -> None:
    model = add_skimming(tiny(architecture))
    undecided_predictors(model)
    inputs = padded_inputs()
    together = model(**inputs).last_hidden_state
    for alone, row, real in zip(_one_by_one(model, inputs), together, inputs["attention_mask"].bool(), strict=True):
        assert relative_error(row[real], alone) <= 2e-5


@pytest.mark.parametrize("architecture", ["bert", "albert"])
@torch.no_grad()
def test_left_padding_with_position_ids(architecture: str) -> None:
    """Left-padded rows with their own positions give what right-padded rows give; place 0 shows the first token."""
    model = add_skimming(tiny(architecture))
    undecided_predictors(model)
    right, left = padded_inputs(), padded_inputs(side="left")
    mask = left["attention_mask"]
    left["input_ids"][mask.bool()] = right["input_ids"][right["attention_mask"].bool()]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(**right).last_hidden_state
    actual = model(**left, position_ids=positions).last_hidden_state
    # Place 0 of a left-padded row is a copy for pooling heads, so that it is no real row of its own here.
    assert relative_error(real_rows(actual, mask), real_rows(expected, right["attention_mask"])) <= 2e-5
    assert relative_error(actual[:, 0], expected[:, 0]) <= 2e-5


@every_architecture
@torch.no_grad()
def test_inputs_embeds(architecture: str) -> None:
    model = add_skimming(tiny(architecture))
    undecided_predictors(model)
    inputs = padded_inputs()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    positions = torch.arange(embeds.size(1)).expand(embeds.shape[:2]) + (2 if architecture == "roberta" else 0)
    mask = inputs["attention_mask"]
    by_ids = model(**inputs, position_ids=positions).last_hidden_state
    by_embeds = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
    assert torch.equal(by_ids, by_embeds)


@every_architecture
@pytest.mark.parametrize("with_offsets", [True, False])
@torch.no_grad()
def test_packed_input_from_the_flattening_collator(architecture: str, with_offsets: bool) -> None:
    model = add_skimming(tiny(architecture))
    undecided_predictors(model)
    inputs = padded_inputs()
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=with_offsets)
    packed = collator([{"input_ids": row} for row in rows])
    packed.pop("labels")
    if architecture == "roberta":
        packed["position_ids"] += 2
    alone = _one_by_one(model, inputs)
    with record_skimming() as records:
        output = model(**packed).last_hidden_state[0]
    assert relative_error(output, torch.cat(alone)) <= 2e-5
    assert records[0].lengths.tolist() == [len(row) for row in rows]


@torch.no_grad()
def test_positions_that_start_anew_separate_the_sequences_of_a_row_only() -> None:
    """DistilBERT's encoder does not see them; they are looked at before."""
    model = add_skimming(tiny("distilbert"))
    ids, places = torch.randint(5, 100, (1, 6)), torch.tensor([[0, 1, 2, 0, 1, 2]])
    alone = torch.cat([model(part).last_hidden_state for part in (ids[:, :3], ids[:, 3:])], 1)
    for packed in (model(ids, position_ids=places), model(ids, None, None, places)):
        torch.testing.assert_close(packed.last_hidden_state, alone)
    for inputs in ({"input_ids": ids.expand(2, 6)}, {"input_ids": ids, "attention_mask": torch.ones(1, 6).long()}):
        with record_skimming() as records:
            model(**inputs, position_ids=places)
        assert records[0].lengths.tolist() == [6] * inputs["input_ids"].size(0)


@pytest.mark.parametrize(
    ("positions", "lengths"),
    [
        ([0, 1, 2, 0, 0, 1], [3, 1, 2]),
        ([4, 5, 0, 0, 1, 2], [2, 1, 3]),  # the first one is the end of a text
        ([0, 1, 2, 3, 3, 3], [6]),  # cut to the positions that a model has
    ],
)
@torch.no_grad()
def test_where_packed_sequences_start(positions: list[int], lengths: list[int]) -> None:
    model = add_skimming(tiny("bert"))
    with record_skimming() as records:
        model(torch.randint(5, 100, (1, 6)), position_ids=torch.tensor([positions]))
    assert records[0].lengths.tolist() == lengths


@torch.no_grad()
def test_whatever_is_not_zero_in_a_mask_is_a_token() -> None:
    model, inputs = add_skimming(tiny("bert", "sequence")), padded_inputs()
    expected = model(**inputs).logits
    for mask in (-inputs["attention_mask"], inputs["attention_mask"] * 0.5, inputs["attention_mask"].bool()):
        assert torch.equal(model(inputs["input_ids"], mask).logits, expected)


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_padding_holds_its_embeddings(training: bool) -> None:
    """In training as at inference, so that what a head makes of padding is the same."""
    model = no_dropout(add_skimming(tiny("bert"))).train(training)
    inputs = padded_inputs()
    padding = ~inputs["attention_mask"].bool()
    embeddings = model.embeddings(inputs["input_ids"])
    torch.testing.assert_close(model(**inputs).last_hidden_state[padding], embeddings[padding])


@torch.no_grad()
def test_odd_batches() -> None:
    model = add_skimming(tiny("bert"))
    undecided_predictors(model)
    empty = torch.zeros(0, 7, dtype=torch.long)
    assert model(input_ids=empty, attention_mask=empty).last_hidden_state.shape == (0, 7, 64)
    # A row without a real token comes back as it went in, and harms nobody.
    inputs = padded_inputs((6, 4))
    expected = model(**inputs).last_hidden_state
    hollow = {key: torch.cat([value, torch.zeros_like(value[:1])]) for key, value in inputs.items()}
    actual = model(**hollow).last_hidden_state
    assert (
        relative_error(real_rows(actual[:2], inputs["attention_mask"]), real_rows(expected, inputs["attention_mask"]))
        <= 1e-5
    )
    assert actual[2].isfinite().all()


@torch.no_grad()
def test_no_mask_means_no_padding() -> None:
    model = add_skimming(tiny("bert"))
    undecided_predictors(model)
    ids = torch.randint(5, VOCABULARY, (3, 8))
    masked = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert torch.equal(model(input_ids=ids).last_hidden_state, masked)


def test_refused_inputs() -> None:
    model = add_skimming(tiny("bert"))
    inputs = padded_inputs()
    square = torch.ones(4, 1, 14, 14)
    with pytest.raises(ValueError, match=r"attention_mask: .*padding mask"):
        model(input_ids=inputs["input_ids"], attention_mask=square)
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(**inputs, output_hidden_states=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="cu_seq_lens_q: packed input has batch size 1"):
        model(**inputs, cu_seq_lens_q=torch.tensor([0, 14]))
    with pytest.raises(ValueError, match="cu_seqlens: ends at 5"):
        model(input_ids=inputs["input_ids"][:1], cu_seq_lens_q=torch.tensor([0, 5]))


@torch.no_grad()
def test_a_nan_state_stays_in_its_sequence() -> None:
    model = add_skimming(tiny("bert"))
    inputs = padded_inputs((6, 5, 6))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    embeds[1, 2] = torch.nan
    output = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    assert output[[0, 2]].isfinite().all() and output[1, 0].isnan().any()


@torch.no_grad()
def test_records_say_what_was_skimmed() -> None:
    model = add_skimming(tiny("bert"))
    undecided_predictors(model)
    inputs = padded_inputs()
    with record_skimming() as records:
        model(**inputs)
        model(**inputs)
    first, second = records
    assert torch.equal(first.keep_masks, second.keep_masks)
    assert first.keep_masks.shape == (LAYERS, *inputs["input_ids"].shape)
    assert torch.equal(first.layer_lengths, first.keep_masks.sum(2))
    assert torch.equal(first.lengths, inputs["attention_mask"].sum(1))
    assert not (first.keep_masks & ~inputs["attention_mask"].bool()).any()
    with record_skimming() as outside:
        pass
    assert outside == []
