"""SQuAD: its questions, from the official JSON or the hub, and its rules of what a right answer is."""

from __future__ import annotations

import json
import lzma
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..windows import Question
from .files import open_text

# Columns of the hub's data sets.
HUB_COLUMNS = ("id", "context", "question", "answers")
_KINDS = {str: "a text", list: "a list", dict: "an object", int: "a whole number"}


def read_questions(path: Path, *, unanswerable: bool) -> list[Question]:
    """Reads SQuAD's JSON file, v1.1 or v2.0; `.xz` is unpacked.

    Args:
        unanswerable: whether questions without an answer are allowed, as in v2.0.

    Raises:
        ValueError: no JSON, a missing key, or an answer that is not where it is said to be; names file and place.
    """
    try:
        with open_text(path) as file:
            document = json.load(file)
    except (ValueError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}: is empty or no whole JSON file: {error}") from error
    found = [_question(row, place, unanswerable) for place, row in _rows(document, str(path))]
    if not found:
        raise ValueError(f"{path}: has no questions")
    return found


def questions_of_hub(rows: Iterable[Mapping[str, Any]], name: str, *, unanswerable: bool) -> list[Question]:
    """The questions of a hub data set's rows with `HUB_COLUMNS`."""
    found = []
    for number, row in enumerate(rows):
        answers = row["answers"]
        pairs = [
            {"text": text, "answer_start": start}
            for text, start in zip(answers["text"], answers["answer_start"], strict=True)
        ]
        found.append(_question({**row, "answers": pairs}, f"{name}, row {number}", unanswerable))
    return found


def _rows(document: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, question with its passage), all through the file."""
    for a, article in enumerate(_get(document, "data", list, path)):
        here = f"{path}: data[{a}]"
        for p, paragraph in enumerate(_get(article, "paragraphs", list, here)):
            place = f"{here}.paragraphs[{p}]"
            context = _get(paragraph, "context", str, place)
            for q, row in enumerate(_get(paragraph, "qas", list, place)):
                where = f"{place}.qas[{q}]"
                yield where, {**_object(row, where), "context": context}


def _question(row: Mapping[str, Any], place: str, unanswerable: bool) -> Question:
    identity, text, passage = (_get(row, key, str, place) for key in ("id", "question", "context"))
    answers = _get(row, "answers", list, place)
    if not passage.strip():
        raise ValueError(f"{place}: 'context' is empty")
    if bool(row.get("is_impossible", not answers)) != (not answers):
        raise ValueError(f"{place}: 'is_impossible' is {row['is_impossible']}, but it has {len(answers)} answers")
    if not answers and not unanswerable:
        raise ValueError(f"{place}: has no answer, as only questions of SQuAD v2.0 (--task squad2) may")
    pairs = [(_get(a, "text", str, place), _get(a, "answer_start", int, place)) for a in answers]
    for answer, start in pairs:
        there = passage[max(start, 0) : max(start, 0) + len(answer)]
        if not answer or start < 0 or there != answer:
            raise ValueError(f"{place}: answer {answer!r} is not at 'answer_start' {start}, where {there!r} stands")
    return Question(identity, text, passage, tuple(a for a, _ in pairs), tuple(start for _, start in pairs))


def _get(holder: Any, key: str, kind: type, place: str) -> Any:
    if key not in _object(holder, place):
        raise ValueError(f"{place}: has no {key!r}, only {', '.join(map(repr, holder)) or 'nothing'}")
    value = holder[key]
    if not isinstance(value, kind):
        raise ValueError(f"{place}: {key!r} must be {_KINDS[kind]}, got {value!r:.60}")
    return value


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place}: must be an object, got {value!r:.60}")
    return dict(value)


def normalized(text: str) -> str:
    """As the official scripts compare answers: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(prediction: str, answers: Sequence[str], *, unanswerable: bool) -> tuple[float, float]:
    """(exact match, F1) of a predicted answer, the best over the given ones; "" means that there is none.

    `unanswerable`: by the rules of v2.0, where an answer of no words is none; v1.1 gives it an F1 of 0.
    """
    given = [normalized(answer) for answer in answers]
    if unanswerable:
        given = [answer for answer in given if answer] or [""]
    said = normalized(prediction)
    return max(float(said == answer) for answer in given), max(_f1(said, answer, unanswerable) for answer in given)


def _f1(said: str, answer: str, unanswerable: bool) -> float:
    mine, theirs = said.split(), answer.split()
    if not mine or not theirs:
        return float(unanswerable and mine == theirs)
    common = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs))
