"""What makes metrics of a model's outputs, batch by batch: of classes and numbers, and of spans of a passage."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tasks.metrics import predicted, score
from ..tasks.squad import answer_scores
from ..windows import QuestionWindows

# As the published scripts search: so many spans of a window, none of more tokens.
N_BEST, LONGEST_ANSWER = 20, 30


class Judge(Protocol):
    """Sees every batch's output once, then knows the metrics."""

    @property
    def predictions(self) -> Any: ...

    def see(self, batch: Mapping[str, Tensor], output: Any) -> None: ...

    def metrics(self) -> dict[str, float]: ...


class ClassJudge:
    """Of classes or numbers, against the batches' `labels`; predictions: as `SkimEvaluation` has them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._predictions: list[Tensor] = []
        self._labels: list[Tensor] = []

    @property
    def predictions(self) -> Tensor:
        return torch.cat(self._predictions)

    def see(self, batch: Mapping[str, Tensor], output: Any) -> None:
        self._predictions.append(predicted(output.logits).cpu())
        self._labels.append(batch["labels"].cpu())

    def metrics(self) -> dict[str, float]:
        return score(torch.cat(self._labels), self.predictions, self.names)


@dataclass(frozen=True, order=True)
class Answer:
    """A span of a passage: its score (start and end logit added up), text, and characters from start up to end."""

    score: float
    text: str
    start: int
    end: int


class SpanJudge:
    """Of spans in windows on passages, by SQuAD's rules.

    A question's answer is the best span over all its windows; where it may have none, "" if the first token's score,
    the least over its windows, exceeds that of the best span by more than `threshold`.

    Args:
        windows: what the batches were made from.
        unanswerable: whether a question may have no answer (v2.0).
    """

    def __init__(self, windows: QuestionWindows, *, unanswerable: bool, threshold: float = 0.0) -> None:
        self.windows = windows
        self.unanswerable = unanswerable
        self.threshold = threshold
        self._best: list[list[Answer]] = [[] for _ in windows.questions]
        self._none = [math.inf] * len(windows.questions)

    def see(self, batch: Mapping[str, Tensor], output: Any) -> None:
        start, end = output.start_logits.float().cpu(), output.end_logits.float().cpu()
        numbers = batch["labels"].tolist()
        passages = self.windows.passages[numbers]  # [batch, 2]
        place = torch.arange(start.size(1))
        inside = (place >= passages[:, :1]) & (place < passages[:, 1:])
        scores, starts, ends = best_spans(start, end, inside)
        none = (start[:, 0] + end[:, 0]).tolist()
        for row, window in enumerate(numbers):
            question = self.windows.question_of[window]
            first = int(passages[row, 0])
            spans = zip(scores[row].tolist(), (starts[row] - first).tolist(), (ends[row] - first).tolist(), strict=True)
            found = [self._answer(window, *span) for span in spans if math.isfinite(span[0])]
            # The same span may have been seen in another window; the better of the two comes first.
            self._best[question] = heapq.nlargest(N_BEST, [*self._best[question], *found])
            self._none[question] = min(self._none[question], none[row])

    def _answer(self, window: int, score: float, first: int, last: int) -> Answer:
        offsets = self.windows.offsets[window]
        start, end = int(offsets[first, 0]), int(offsets[last, 1])
        text = self.windows.questions[self.windows.question_of[window]].passage[start:end]
        start += len(text) - len(text.lstrip())  # some tokenizers count the space before a word as part of it
        text = text.strip()
        return Answer(score, text, start, start + len(text))

    def n_best(self, question: int) -> list[Answer]:
        """The best spans of a question, best first, each text once."""
        best: dict[str, Answer] = {}
        for answer in self._best[question]:
            best.setdefault(answer.text, answer)
        return list(best.values())

    def answer(self, question: int) -> Answer | None:
        """What is answered to a question; None: that it has no answer."""
        best = self._best[question]
        if not best or (self.unanswerable and self._none[question] - best[0].score > self.threshold):
            return None
        return best[0]

    @property
    def predictions(self) -> dict[str, str]:
        """Answer by the question's id, "" where there is none, as the official scripts read them."""
        answers = (self.answer(number) for number in range(len(self._best)))
        return {
            question.id: "" if answer is None else answer.text
            for question, answer in zip(self.windows.questions, answers, strict=True)
        }

    def metrics(self) -> dict[str, float]:
        """f1 and exact_match, each at most 1; with unanswerable questions also their F1 and that of the others."""
        scores = []
        for number, question in enumerate(self.windows.questions):
            answer = self.answer(number)
            scores.append(self._scores("" if answer is None else answer.text, question.answers))
        exact, f1 = (torch.tensor(column, dtype=torch.float64) for column in zip(*scores, strict=True))
        found = {"f1": float(f1.mean()), "exact_match": float(exact.mean())}
        if self.unanswerable:
            has_answer = torch.tensor([bool(question.answers) for question in self.windows.questions])
            for name, chosen in (("f1_answerable", has_answer), ("f1_unanswerable", ~has_answer)):
                if chosen.any():
                    found[name] = float(f1[chosen].mean())
        return found

    def best_threshold(self) -> float:
        """The threshold at which the F1 of the questions seen is highest."""
        found = []
        for number, question in enumerate(self.windows.questions):
            if self._best[number]:
                best = self._best[number][0]
                # What answering is worth, against saying that there is no answer.
                gain = self._scores(best.text, question.answers)[1] - self._scores("", question.answers)[1]
                found.append((self._none[number] - best.score, gain))
        if not found:
            return self.threshold
        margins, gains = (torch.tensor(column, dtype=torch.float64) for column in zip(*sorted(found), strict=True))
        # Margins up to the threshold are answered: choose how many of the sorted ones.
        total = torch.cat([gains.new_zeros(1), gains.cumsum(0)])
        count = int(total.argmax())
        return float(margins[count - 1]) if count else float(margins[0]) - 1.0

    def _scores(self, prediction: str, answers: Sequence[str]) -> tuple[float, float]:
        return answer_scores(prediction, answers, unanswerable=self.unanswerable)


def best_spans(
    start: Tensor, end: Tensor, inside: Tensor, count: int = N_BEST, longest: int = LONGEST_ANSWER
) -> tuple[Tensor, Tensor, Tensor]:
    """The spans of at most `longest` tokens with the largest start + end logit.

    Args:
        start, end: fp32 [batch, seq]; inside: bool [batch, seq], where a span may lie.

    Returns:
        Scores fp32, first and last places int64, each [batch, count or less], best first; a score of -inf means that
        there are no more.
    """
    start, end = (logits.masked_fill(~inside, -math.inf) for logits in (start, end))
    ends = F.pad(end, (0, longest - 1), value=-math.inf).unfold(1, longest, 1)  # [batch, seq, longest]
    scores = (start.unsqueeze(-1) + ends).flatten(1)
    best, places = scores.topk(min(count, scores.size(1)))
    return best, places // longest, places // longest + places % longest
