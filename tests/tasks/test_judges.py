"""What a judge of spans makes of several windows and of missing answers, and what evaluating leaves of the mode."""

from __future__ import annotations

import pytest
import torch
from transkimmer import add_skimming
from transkimmer.training.evaluation import evaluate
from transkimmer.windows import Question

from ..models.tiny import padded_inputs, tiny
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


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_mode_as_it_was(training: bool) -> None:
    model = add_skimming(tiny("bert", "sequence")).train(training)
    evaluate(model, [padded_inputs()])
    assert model.training is training
    with pytest.raises(ValueError, match="no examples to evaluate"):
        evaluate(model, [])
    assert model.training is training
