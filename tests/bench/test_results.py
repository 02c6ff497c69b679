"""Figures in the README and the demo's weights are those that are stored."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transkimmer.data import TokenizedExamples, padded_batches
from transkimmer.demo import load_demo, sentences, stored_figures
from transkimmer.training import evaluate_classifier

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_stored_results() -> None:
    report = [sys.executable, "-m", "benchmarks.report", "--check"]
    assert subprocess.run(report, cwd=ROOT, check=False).returncode == 0


def test_the_fill_of_tiles_is_what_the_docs_say() -> None:
    count = [sys.executable, "-m", "benchmarks.attention_tiles", "--check"]
    assert subprocess.run(count, cwd=ROOT, check=False).returncode == 0


RESULTS = sorted((ROOT / "benchmarks/results").rglob("*.json"))
OTHERS = ("gpu-check", "experiments")  # no rows of a command


@pytest.mark.parametrize("path", [path for path in RESULTS if path.stem not in OTHERS], ids=lambda path: path.stem)
def test_stored_results_are_complete(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"torch", "processor", "threads"} <= set(result["environment"])
    assert result["rows"]
    assert all(row["median_s"] > 0 for row in result["rows"] if "median_s" in row)


@pytest.mark.parametrize("path", [path for path in RESULTS if path.stem in OTHERS], ids=lambda path: path.stem)
def test_what_only_a_gpu_gave_says_where_and_with_what(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    name = result["device"] if isinstance(result["device"], str) else result["device"]["name"]
    assert path.parent.name == name.lower().replace(" ", "-")
    assert result["date"] and {"torch", "triton"} <= set(result["versions"])
    assert not any(step["status"] == "failed" and step["details"]["failed"] for step in result.get("steps", ()))


def test_the_demo_is_as_good_as_stored() -> None:
    """The committed weights on all of SST-2's development sentences, by the deterministic decision."""
    model, tokenizer = load_demo()
    examples = TokenizedExamples(sentences(), tokenizer)
    result = evaluate_classifier(model, padded_batches(examples, tokenizer, 64, sort=True))
    stored = stored_figures()
    # Other processors round differently; a sentence on the edge may fall to the other side.
    assert result.accuracy == pytest.approx(stored["accuracy"], abs=3 / 872)
    assert result.flops_speedup == pytest.approx(stored["flops_speedup"], rel=0.01)
    assert model.skimming.config.threshold == 0.5


@torch.no_grad()
def test_the_demo_in_bf16_gives_the_same_answers() -> None:
    answers = []
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_demo(dtype=dtype)
        examples = TokenizedExamples(sentences()[:128], tokenizer)
        batches = padded_batches(examples, tokenizer, 32)
        answers.append(evaluate_classifier(model, batches).predictions)
    assert (answers[0] == answers[1]).double().mean() >= 0.97
