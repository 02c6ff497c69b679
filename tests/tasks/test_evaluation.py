"""What evaluating makes of a model: its figures, their table, and the training forward beside real removal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transkimmer import SkimConfig, add_skimming, record_skimming
from transkimmer.bench.contenders import KEEP_ALL, SKIMMING
from transkimmer.cli import main
from transkimmer.flops import EncoderShape
from transkimmer.tasks import TASKS
from transkimmer.training import evaluate, evaluation, evaluation_command, training_forward_difference
from transkimmer.training.judges import ClassJudge

from ..models.tiny import padded_inputs, tiny, undecided_predictors
from ..models.words import word_tokenizer


def batches() -> list[dict[str, torch.Tensor]]:
    return [padded_inputs(lengths) | {"labels": torch.tensor([0, 1])} for lengths in ((9, 4), (14, 6))]


@pytest.mark.parametrize("decision", ["threshold", "sample"])
def test_figures_are_those_of_the_closed_forms(decision: str) -> None:
    model = add_skimming(tiny("bert", "sequence"), SkimConfig(decision=decision, predictor_width=24)).eval()
    undecided_predictors(model)
    torch.manual_seed(0)
    figures = evaluation_command.figures_of(model, TASKS["rte"], batches(), 0, ClassJudge(["accuracy"]))
    torch.manual_seed(0)
    found = evaluate(model, batches())
    lengths, layers = found.lengths, found.layer_lengths
    shape = EncoderShape.of(model.config, 24)
    dense = shape.dense_flops(lengths, first_token_only=True)
    as_executed = shape.as_executed(scores_first=decision == "sample")
    executed = as_executed.skimming_flops(lengths, layers, first_token_only=True)
    assert figures["executed_flops"] == figures["counted_flops"] == executed
    assert figures["executed_flops_speedup"] == dense / executed
    assert figures["flops_speedup"] == shape.flops_speedup(lengths, layers)
    padded = shape.dense_flops(torch.full((4,), 256)) / shape.skimming_flops(lengths, layers)
    assert (figures["padded_length"], figures["padded_flops_speedup"]) == (256, padded)
    assert figures["tokens_kept"] == pytest.approx(float(layers.sum() / lengths.sum() / 3)) and figures["examples"] == 4
    assert layers[1].sum() < lengths.sum() and "wall_clock_speedup" not in figures


def test_figures_of_known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratios of 9, 2 and 1: not the mean of them, nor the ratio of the medians."""
    model = add_skimming(tiny("bert", "sequence"), SkimConfig(schedule=[1.0, 0.6, 0.2])).eval()
    timed: list[Any] = []

    def time_in_turn(field: Any, batches: Any, repeats: int, measure: str, **rest: Any) -> dict[str, list[float]]:
        timed.append(([contender.name for contender in field], [b.lengths.tolist() for b in batches], repeats, measure))
        model.skimming.enabled = False  # as the dense run leaves it
        return {KEEP_ALL: [9.0, 2.0, 4.0], SKIMMING: [1.0, 1.0, 4.0]}

    monkeypatch.setattr(evaluation_command, "time_in_turn", time_in_turn)
    figures = evaluation_command.figures_of(model, TASKS["rte"], batches(), 3, ClassJudge(["accuracy"]))
    assert timed[-1] == ([KEEP_ALL, SKIMMING], [[9, 4], [14, 6]], 3, KEEP_ALL)
    assert (figures["dense_s"], figures["skimming_s"], figures["wall_clock_speedup"]) == (4.0, 1.0, 2.0)
    assert figures["spread"] == 3.0 and model.skimming.enabled
    assert figures["skim_efficiency"] == 2 / figures["executed_flops_speedup"] != 2 / figures["flops_speedup"]


def test_every_line_of_the_table_has_its_own_figure() -> None:
    figures = {"metrics": {"accuracy": 0.9012}, "decision": "threshold", "padded_length": 256, "examples": 7}
    figures |= {"flops_speedup": 2.11, "padded_flops_speedup": 3.22, "executed_flops_speedup": 4.33}
    figures |= {"executed_flops": 5000, "counted_flops": 6000, "wall_clock_speedup": 7.44, "skim_efficiency": 0.85}
    figures |= {"spread": 0.96, "tokens_kept": 0.107, "tokens_kept_by_layer": [0.5, 0.25]}
    forward = {"metrics": {"accuracy": 0.8034}, "agreement": 0.7056, "max_difference": 1.2e-5, "max_logit": 0.0262}
    lines = evaluation_command.markdown(TASKS["rte"], "dev", figures | {"training_forward": forward}).splitlines()
    assert lines[0] == "| RTE, dev, 7 rows | |"
    assert dict(line.strip("| ").split(" | ") for line in lines[2:]) == {
        "accuracy": "0.9012",
        "FLOPs speedup, no padding": "2.11",
        "FLOPs speedup, dense padded to 256": "3.22",
        "FLOPs speedup, as executed": "4.33",
        "FLOPs executed, closed form": "5,000",
        "FLOPs executed, counted operator by operator": "6,000",
        "wall-clock speedup over our dense run without padding": "7.44",
        "skim efficiency": "0.85",
        "spread of the timing": "96%",
        "tokens kept": "10.7%",
        "tokens kept by layer": "50% 25%",
        "accuracy in the training forward": "0.8034",
        "same prediction in the training forward": "70.56%",
        "largest difference of a logit, training forward and removal": "1.2e-05 of 0.0262",
    }


@pytest.mark.parametrize(("options", "length"), [([], 8), (["--max-length", "5"], 5)])
def test_a_length_that_is_asked_for_goes_before_that_of_the_run(
    options: list[str], length: int, tmp_path: Path
) -> None:
    add_skimming(tiny("bert", "sequence")).save_pretrained(tmp_path / "run/model")
    word_tokenizer().save_pretrained(tmp_path / "run/model")
    settings = {"task": "sst2", "recipe": {"max_length": 8, "doc_stride": None}}
    (tmp_path / "run/settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\n" + "dog " * 12 + "\t1\n", encoding="utf-8")
    evaluate = ["evaluate", "--model", str(tmp_path / "run"), "--task", "sst2", "--data", str(tmp_path)]
    with pytest.warns(UserWarning, match=f"cut to {length} tokens"):
        assert main([*evaluate, "--repeats", "0", *options]) == 0


def test_the_training_forward_has_a_judge_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its metrics would be of both forwards."""
    add_skimming(tiny("bert", "sequence")).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ndog\t1\ncat runs\t0\n", encoding="utf-8")
    judges: list[Any] = []
    forward = evaluation_command.training_forward_difference

    def noted(model: Any, batches: Any, judge: Any) -> Any:
        found = forward(model, batches, judge)
        judges.append(judge)
        return found

    monkeypatch.setattr(evaluation_command, "training_forward_difference", noted)
    evaluate = ["evaluate", "--model", str(tmp_path / "model"), "--task", "sst2", "--data", str(tmp_path)]
    assert main([*evaluate, "--repeats", "0", "--check-training-forward"]) == 0
    assert len(judges) == 1 and judges[0].predictions.numel() == 2


# The training forward


@pytest.mark.parametrize("options", [{"threshold": 0.9}, {"decision": "sample"}])
def test_both_forwards_decide_by_the_models_threshold(options: dict[str, Any]) -> None:
    model = add_skimming(tiny("bert", "sequence"), SkimConfig(**options)).eval()
    undecided_predictors(model)
    batches = [padded_inputs((40, 31, 25, 38))]
    with record_skimming() as records:
        model(**batches[0])
    assert 0.1 < float(records[0].tokens_kept.mean()) < 0.9
    found = training_forward_difference(model, batches)
    assert found.max_difference <= 1e-4 * found.max_logit and found.agreement == 1.0
    assert not model.training and model.skimming.config.decision == options.get("decision", "threshold")


@pytest.mark.parametrize(("head", "changed", "agreement"), [("sequence", 1, 6 / 8), ("qa", 0, 6 / 8), ("qa", 1, 6 / 8)])
def test_agreement_is_of_all_rows_in_all_of_their_answers(
    head: str, changed: int, agreement: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of every batch has another class; of a question, another start or another end."""
    model = add_skimming(tiny("bert", head)).eval()
    forward = evaluation._training_forward

    def other(model: Any, inputs: Any) -> Any:
        output = forward(model, inputs)
        if head == "sequence":
            output.logits[2] = -output.logits[2]
        else:
            logits = (output.start_logits, output.end_logits)[changed]
            logits[2] = -logits[2]
        return output

    monkeypatch.setattr(evaluation, "_training_forward", other)
    assert training_forward_difference(model, [padded_inputs()] * 2).agreement == agreement


def test_a_training_forward_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any batch, before or behind others that are."""
    forward = evaluation._training_forward
    for bad in (0, 1):
        calls: list[Any] = []

        def poisoned(model: Any, inputs: Any, bad: int = bad, calls: list[Any] = calls) -> Any:
            calls.append(forward(model, inputs))
            if len(calls) - 1 == bad:
                calls[-1].logits[0, 0] = math.nan
            return calls[-1]

        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "_training_forward", poisoned)
            found = training_forward_difference(add_skimming(tiny("bert", "sequence")), [padded_inputs()] * 2)
        assert len(calls) == 2 and math.isnan(found.max_difference) and math.isfinite(found.max_logit)
