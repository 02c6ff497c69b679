"""What the table of tasks says of each: what is compared, how classes are numbered, and the paper's settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transkimmer.tasks import TASKS

PAPER = json.loads((Path(__file__).parents[2] / "benchmarks/paper.json").read_text(encoding="utf-8"))["data"]


def test_what_is_compared() -> None:
    others = {"cola": "matthews", "stsb": "pearson", "squad": "f1", "squad2": "f1"}
    assert {name: task.metric for name, task in TASKS.items()} == dict.fromkeys(TASKS, "accuracy") | others


def test_how_entailment_is_numbered() -> None:
    """GLUE's number for it is 0, except in WNLI."""
    found = {name: TASKS[name].classes.index("entailment") for name in ("rte", "qnli", "wnli", "mnli")}
    assert found == {"rte": 0, "qnli": 0, "wnli": 1, "mnli": 0}
    assert TASKS["mnli"].classes == ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize("name", PAPER)
def test_tasks_have_the_papers_settings(name: str) -> None:
    task, wanted = TASKS[name], PAPER[name]
    found = {"title": task.title, "padded_to": task.padded_length, "skim_weight": task.paper_skim_weight}
    assert found == {key: wanted[key] for key in found}
