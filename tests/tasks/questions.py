"""A few questions in SQuAD's format, and files of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any


def entry(identity: str, question: str, passage: str, *answers: str, impossible: bool | None = None) -> dict[str, Any]:
    """One question and its passage; answers are where they first stand."""
    row: dict[str, Any] = {
        "id": identity,
        "question": question,
        "answers": [{"text": answer, "answer_start": passage.find(answer)} for answer in answers],
    }
    if impossible is not None:
        row["is_impossible"] = impossible
    return {"context": passage, "qas": [row]}


def write_squad(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": entries}]}), encoding="utf-8")
    return path


def animals(count: int, *, unanswerable: bool) -> list[dict[str, Any]]:
    """ "Who is happy?": the animal before "happy", if there is one; long passages need several windows."""
    words = random.Random(count)
    entries = []
    for number in range(count):
        passage = words.choices(["runs", "sleeps", "sad", "un"], k=words.randint(3, 30))
        animal = words.choice(["dog", "cat"])
        answered = not (unanswerable and number % 3 == 0)
        if answered:
            passage.insert(words.randrange(len(passage)), f"{animal} happy")
        answers = [animal] if answered else []
        entries.append(
            entry(
                str(number), "un happy", " ".join(passage), *answers, impossible=not answered if unanswerable else None
            )
        )
    return entries
