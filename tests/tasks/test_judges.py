"""What a judge of spans makes of windows, of missing and of half right answers; what evaluating leaves of the mode."""

from __future__ import annotations

import pytest
import torch
from transkimmer import add_skimming
from transkimmer.tasks import TASKS
from transkimmer.training.evaluation import evaluate
from transkimmer.training.judges import SpanJudge, best_spans
from transkimmer.training.kinds import NO_ANSWER_THRESHOLD, kind_of
from transkimmer.windows import Question, QuestionWindows

from ..models.tiny import padded_inputs, tiny
from ..models.words import word_tokenizer
from .test_squad import judged, question


@pytest.mark.parametrize("none", [(5.0, -5.0, -5.0), (-5.0, 5.0, 5.0)])
def test_no_answer_scores_the_least_over_the_windows(none: tuple[float, ...]) -> None:
    """A window without the answer has reason to say so; one with it has none."""
    judge = judged([question()], {2: ("sad dog", 1.0)}, torch.tensor(none), unanswerable=True)
    assert judge.predictions == {"q": "sad dog"}


def test_each_text_comes_with_its_best_score() -> None:
    judge = judged([question()], {0: ("happy cat", 6.0), 1: ("happy cat", 4.0)}, 0.0, unanswerable=False)
    best = judge.n_best(0)
    assert (best[0].text, best[0].score) == ("happy cat", 6.0)
    assert [answer.score for answer in best] == sorted((answer.score for answer in best), reverse=True)
    assert len({answer.text for answer in best}) == len(best)


@pytest.mark.parametrize(
    ("questions", "names"),
    [
        ([question()], {"f1_answerable"}),
        ([Question("none", "dog", "cat runs")], {"f1_unanswerable"}),
        ([question(), Question("none", "dog", "cat runs")], {"f1_answerable", "f1_unanswerable"}),
    ],
)
def test_nothing_is_said_of_a_kind_of_questions_that_there_is_none_of(
    questions: list[Question], names: set[str]
) -> None:
    assert set(judged(questions, {}, 0.0, unanswerable=True).metrics()) == {"f1", "exact_match", *names}


def test_half_right_answers_and_missing_ones_have_figures_of_their_own() -> None:
    questions = [question(answer="sad dog sleeps"), Question("none", "dog", "cat runs")]
    judge = judged(questions, {2: ("sad dog", 5.0)}, 4.0, unanswerable=True)
    assert judge.predictions == {"q": "sad dog", "none": ""}
    metrics = {"f1": 0.9, "exact_match": 0.5, "f1_answerable": 0.8, "f1_unanswerable": 1.0}
    assert judge.metrics() == pytest.approx(metrics)


def test_a_judge_has_the_models_own_threshold() -> None:
    kind, model = kind_of(TASKS["squad2"]), tiny("bert", "qa")
    windows = QuestionWindows([question()], word_tokenizer(), 10, 2)
    assert kind.judge(windows, model).threshold == 0.0
    setattr(model.config, NO_ANSWER_THRESHOLD, -2.5)
    assert kind.judge(windows, model).threshold == -2.5


def test_a_space_in_front_of_a_token_is_no_part_of_the_answer() -> None:
    """Byte-level tokenizers have it within the offsets of a word."""
    windows = QuestionWindows([question("dog runs", "runs")], word_tokenizer(), 10, 2)
    windows.offsets[0] = torch.tensor([[0, 3], [3, 8]], dtype=torch.int32)
    answer = SpanJudge(windows, unanswerable=False)._answer(0, 1.0, 1, 1)
    assert (answer.text, answer.start, answer.end) == ("runs", 4, 8)


@pytest.mark.parametrize(("last", "found"), [(29, (0, 29)), (30, (0, 1))])
def test_an_answer_has_at_most_thirty_tokens(last: int, found: tuple[int, int]) -> None:
    start, end = torch.full((2, 1, 40), -5.0)
    start[0, 0], end[0, last], end[0, 1] = 9.0, 9.0, 2.0
    _, starts, ends = best_spans(start, end, torch.ones(1, 40, dtype=torch.bool))
    assert (int(starts[0, 0]), int(ends[0, 0])) == found and starts.size(1) == 20


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_mode_as_it_was(training: bool) -> None:
    model = add_skimming(tiny("bert", "sequence")).train(training)
    evaluate(model, [padded_inputs()])
    assert model.training is training
    with pytest.raises(ValueError, match="no examples to evaluate"):
        evaluate(model, [])
    assert model.training is training
