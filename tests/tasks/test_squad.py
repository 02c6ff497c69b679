"""SQuAD: its files, windows on long passages, spans, the official rules, and a run from start to finish."""

from __future__ import annotations

import itertools
import json
import lzma
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from transkimmer.cli import main
from transkimmer.data import padded_batches
from transkimmer.outputs import logits_in
from transkimmer.skimming import add_skimming
from transkimmer.tasks import TASKS, load_split
from transkimmer.tasks.squad import answer_scores
from transkimmer.training.judges import SpanJudge, best_spans
from transkimmer.training.kinds import kind_of
from transkimmer.training.passages import passage_text, read_passage
from transkimmer.training.recipe import recipe_of
from transkimmer.training.run import lessons_of
from transkimmer.training.trainer import PaddingCollator, distillation_loss
from transkimmer.windows import Question, QuestionWindows

from ..models.tiny import tiny, undecided_predictors
from ..models.words import word_tokenizer
from .questions import animals, entry, write_squad

PASSAGE = "dog runs. happy cat sleeps, sad dog sleeps"


def question(passage: str = PASSAGE, answer: str = "sad dog", identity: str = "q") -> Question:
    return Question(identity, "un dog", passage, (answer,), (passage.index(answer),))


# Files


def test_official_files(tmp_path: Path) -> None:
    rows = [entry("a", "un dog", PASSAGE, "cat", "happy cat"), entry("b", "un cat", PASSAGE, impossible=True)]
    (tmp_path / "SQuAD").mkdir()
    written = write_squad(tmp_path / "SQuAD/dev-v2.0.json", rows)
    answered = Question("a", "un dog", PASSAGE, ("cat", "happy cat"), (16, 10))
    assert load_split(TASKS["squad2"], "dev", tmp_path) == [answered, Question("b", "un cat", PASSAGE)]
    (tmp_path / "squad-v1.1-train.json.xz").write_bytes(lzma.compress(written.read_bytes()))
    with pytest.raises(ValueError, match=r"qas\[0\]: has no answer, as only questions of SQuAD v2\.0"):
        load_split(TASKS["squad"], "train", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has none of dev-v1\.1\.json, dev-v1\.1\.json\.xz, squad-v1\.1"):
        load_split(TASKS["squad"], "dev", tmp_path)


def changed(**keys: Any) -> dict[str, Any]:
    row = entry("a", "un dog", PASSAGE, "cat")
    row["qas"][0] |= keys
    return row


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"train-v2\.0\.json: is empty or no whole JSON file"),
        ('{"data": [', r"is empty or no whole JSON file"),
        ("[]", r"train-v2\.0\.json: must be an object, got \[\]"),
        ('{"version": 1}', r"has no 'data', only 'version'"),
        ('{"data": []}', r"has no questions"),
        ({"context": PASSAGE}, r"data\[0\]\.paragraphs\[0\]: has no 'qas', only 'context'"),
        ({"context": PASSAGE, "qas": [{"id": "a"}]}, r"qas\[0\]: has no 'question', only 'id', 'context'"),
        (changed(question=3), r"qas\[0\]: 'question' must be a text, got 3"),
        (changed(answers=[{"text": "cat"}]), r"has no 'answer_start', only 'text'"),
        (
            changed(answers=[{"text": "cat", "answer_start": 15}]),
            r"'cat' is not at 'answer_start' 15, where ' ca' stands",
        ),
        (changed(answers=[{"text": "cat", "answer_start": -26}]), r"'cat' is not at 'answer_start' -26"),
        (changed(answers=[{"text": "dog", "answer_start": -1}]), r"'dog' is not at 'answer_start' -1"),  # it begins so
        (changed(answers=[{"text": "", "answer_start": 0}]), r"'' is not at 'answer_start' 0"),
        (changed(is_impossible=True), r"'is_impossible' is True, but it has 1 answers"),
        (changed(is_impossible=False, answers=[]), r"'is_impossible' is False, but it has 0 answers"),
        (entry("a", "un dog", " "), r"'context' is empty"),
    ],
)
def test_bad_files(tmp_path: Path, content: str | dict[str, Any], message: str) -> None:
    path = tmp_path / "train-v2.0.json"
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        write_squad(path, [content])
    with pytest.raises(ValueError, match=message):
        load_split(TASKS["squad2"], "train", tmp_path)


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{"text": ["cat"], "answer_start": [16]}, {"text": [], "answer_start": []}]
    columns = {"id": ["a", "b"], "context": [PASSAGE] * 2, "question": ["un dog", "un cat"], "answers": answers}
    rows = datasets.Dataset.from_dict(columns)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: rows)
    found = load_split(TASKS["squad2"], "dev")
    assert found == [Question("a", "un dog", PASSAGE, ("cat",), (16,)), Question("b", "un cat", PASSAGE)]
    with pytest.raises(ValueError, match=r"rajpurkar/squad, row 1: has no answer"):
        load_split(TASKS["squad"], "dev")


# Windows


def test_windows_overlap_and_know_their_answers() -> None:
    tokenizer = word_tokenizer()
    windows = QuestionWindows([question(), Question("none", "dog", "cat runs")], tokenizer, max_length=10, doc_stride=2)
    # [CLS] un dog [SEP] passage [SEP]: 5 of the passage's 10 tokens to a window, 2 of them shared.
    texts = [tokenizer.convert_ids_to_tokens(ids[4:-1]) for ids in windows.input_ids[:-1]]
    unknown = "[UNK]"
    assert texts == [
        ["dog", "runs", unknown, "happy", "cat"],
        ["happy", "cat", "sleeps", unknown, "sad"],
        [unknown, "sad", "dog", "sleeps"],
    ]
    assert windows.question_of == [0, 0, 0, 1]
    assert windows.passages.tolist() == [[4, 9], [4, 9], [4, 8], [3, 5]]
    # "sad dog" is cut in the second window, which therefore has no answer.
    assert windows.positions == [(0, 0), (0, 0), (5, 6), (0, 0)]
    assert windows[2] == {
        "input_ids": windows.input_ids[2],
        "token_type_ids": windows.columns["token_type_ids"][2],
        "start_positions": 5,
        "end_positions": 6,
    }
    (batch,) = padded_batches(windows, tokenizer, 4)
    assert batch["labels"].tolist() == [0, 1, 2, 3] and batch["attention_mask"].sum(1).tolist() == [10, 10, 9, 6]


def test_answers_within_a_word_take_the_whole_word() -> None:
    windows = QuestionWindows([question("dog unhappy runs", "happy")], word_tokenizer(), 12, 0)
    assert windows.positions == [(6, 6)]  # "un", "##happy": the piece that holds it


@pytest.mark.parametrize(("answer", "tokens"), [("dog", (4, 4)), ("cat", (8, 8)), ("dog runs. happy cat", (4, 8))])
def test_an_answer_may_begin_and_end_a_window(answer: str, tokens: tuple[int, int]) -> None:
    windows = QuestionWindows([question("dog runs. happy cat", answer)], word_tokenizer(), 10, 2)
    assert windows.positions == [tokens]


def test_questions_of_later_chunks_keep_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transkimmer.windows._CHUNK", 2)
    questions = [question("cat runs", answer) for answer in ("cat", "runs", "cat", "runs", "runs")]
    windows = QuestionWindows(questions, word_tokenizer(), 10, 2)
    assert windows.question_of == windows.labels == [0, 1, 2, 3, 4]
    assert windows.positions == [(4, 4), (5, 5), (4, 4), (5, 5), (5, 5)]


@pytest.mark.parametrize(
    ("max_length", "doc_stride", "message"),
    [
        (5, 0, r"max_length 5: question 'q' has 2 tokens, which with 3 special ones leave no room"),
        (
            10,
            5,
            r"doc_stride 5: must be at least 0 and less than 5, what question 'q' of 2 tokens leaves of max_length 10",
        ),
        (10, -1, r"doc_stride -1: must be at least 0"),
    ],
)
def test_no_room_for_a_passage(max_length: int, doc_stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestionWindows([question()], word_tokenizer(), max_length, doc_stride)


def test_a_tokenizer_that_pads_on_the_left_is_refused() -> None:
    tokenizer = word_tokenizer()
    tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="tokenizer: questions need a fast one that pads on the right"):
        QuestionWindows([question()], tokenizer, 10, 2)


# Spans


def test_best_spans_are_those_of_a_full_search() -> None:
    start, end = torch.randn(2, 3, 12)
    inside = torch.zeros(3, 12, dtype=torch.bool)
    inside[0, 2:11] = inside[1, 5:7] = True
    scores, first, last = best_spans(start, end, inside, count=5, longest=4)
    for row in range(3):
        places = inside[row].nonzero().flatten().tolist()
        spans = [(a, b) for a, b in itertools.product(places, places) if a <= b < a + 4]
        wanted = sorted(spans, key=lambda span: -float(start[row, span[0]] + end[row, span[1]]))[:5]
        found = [
            (a, b)
            for s, a, b in zip(scores[row], first[row].tolist(), last[row].tolist(), strict=True)
            if s > -math.inf
        ]
        assert found == wanted


def judged(questions: list[Question], wanted: dict[int, tuple[str, float]], none: float, **options: Any) -> SpanJudge:
    """A judge that saw windows of 10 tokens, in which the first token scores `none` and texts what is wanted."""
    windows = QuestionWindows(questions, word_tokenizer(), 10, 2)
    judge = SpanJudge(windows, **options)
    (batch,) = padded_batches(windows, word_tokenizer(), 100)
    start, end = torch.full((2, *batch["input_ids"].shape), -9.0)
    start[:, 0] = end[:, 0] = none / 2
    for window, (text, score) in wanted.items():
        low = windows.questions[windows.question_of[window]].passage.index(text)
        offsets, first = windows.offsets[window].tolist(), int(windows.passages[window, 0])
        start[window, first + [o[0] for o in offsets].index(low)] = score / 2
        end[window, first + [o[1] for o in offsets].index(low + len(text))] = score / 2
    judge.see(batch, SimpleNamespace(start_logits=start, end_logits=end))
    return judge


def test_the_best_window_answers() -> None:
    judge = judged(
        [question()], {0: ("happy cat", 4.0), 1: ("happy cat", 6.0), 2: ("sad dog", 5.0)}, 0.0, unanswerable=False
    )
    assert judge.predictions == {"q": "happy cat"}
    assert [answer.text for answer in judge.n_best(0)][:2] == ["happy cat", "sad dog"]
    assert judge.metrics() == {"f1": 0.0, "exact_match": 0.0}
    answer = judge.answer(0)
    assert answer is not None and (answer.start, answer.end, answer.score) == (10, 19, 6.0)


def test_no_answer_from_a_threshold_on() -> None:
    questions = [question(), Question("none", "dog", "cat runs")]
    judge = judged(questions, {2: ("sad dog", 5.0), 3: ("cat", 3.0)}, 4.0, unanswerable=True)
    assert judge.predictions == {"q": "sad dog", "none": ""}
    assert judge.metrics() == {"f1": 1.0, "exact_match": 1.0, "f1_answerable": 1.0, "f1_unanswerable": 1.0}
    # Margins are -1 and 1: at the best threshold the first is answered and the second is not.
    assert judge.best_threshold() == -1.0
    judge.threshold = -1.5
    assert judge.predictions == {"q": "", "none": ""}
    judge.threshold = 1.0
    assert judge.predictions == {"q": "sad dog", "none": "cat"}
    assert judge.metrics()["f1"] == 0.5


def test_the_best_threshold_is_that_of_a_full_search() -> None:
    torch.manual_seed(3)
    questions = [question(identity=str(n)) if n % 2 else Question(str(n), "dog", "cat runs") for n in range(12)]
    windows = QuestionWindows(questions, word_tokenizer(), 10, 2)
    judge = SpanJudge(windows, unanswerable=True)
    (batch,) = padded_batches(windows, word_tokenizer(), 100)
    start, end = torch.randn(2, *batch["input_ids"].shape) * 3
    judge.see(batch, SimpleNamespace(start_logits=start, end_logits=end))
    best = judge.best_threshold()
    reached = {}
    for threshold in [best, *(value / 20 for value in range(-400, 400))]:
        judge.threshold = threshold
        reached[threshold] = judge.metrics()["f1"]
    assert reached[best] == max(reached.values()) > min(reached.values())


@pytest.mark.parametrize(
    ("prediction", "answers", "unanswerable", "scores"),
    [
        ("The  Cat!", ["a cat"], False, (1.0, 1.0)),
        ("happy cat", ["sad cat", "dog"], False, (0.0, 0.5)),
        ("cat cat dog", ["cat"], False, (0.0, 0.5)),
        ("cat cat", ["cat cat dog"], False, (0.0, 0.8)),  # each as often as it is in both
        ("an owl", ["Owl"], False, (1.0, 1.0)),
        ("happy cat", ["dog", "Happy cat."], False, (1.0, 1.0)),  # the best of the answers, wherever it stands
        ("", ["cat"], True, (0.0, 0.0)),
        ("", [], True, (1.0, 1.0)),
        ("cat", [], True, (0.0, 0.0)),
        # An answer of no words: the two official scripts differ.
        (".", ["."], False, (1.0, 0.0)),
        (".", ["."], True, (1.0, 1.0)),
    ],
)
def test_official_rules(prediction: str, answers: list[str], unanswerable: bool, scores: tuple[float, float]) -> None:
    assert answer_scores(prediction, answers, unanswerable=unanswerable) == pytest.approx(scores)


# Models


def test_a_teacher_of_spans() -> None:
    """Its logits reach the loss unpadded, in order, and padding has no weight."""
    tokenizer, model = word_tokenizer(), tiny("bert", "qa")
    questions = [question(), Question("none", "dog", "cat runs")]
    windows = QuestionWindows(questions, tokenizer, 20, 2)
    windows.teacher_logits, _ = lessons_of(model, windows, tokenizer)
    assert [list(logits.shape) for logits in windows.teacher_logits] == [[2, 15], [2, 6]]
    batch = PaddingCollator(tokenizer)([windows[0], windows[1]])
    teacher = batch.pop("teacher_logits")
    with torch.no_grad():
        mine = logits_in(model(**batch))
    assert torch.equal(batch["start_positions"], torch.tensor([11, 0]))
    torch.testing.assert_close(mine[0], teacher[0], rtol=1e-5, atol=1e-5)
    mine[1, :, 6:] = -1e4  # a student that gives padding nothing either
    assert distillation_loss(mine, teacher, 2.0) == pytest.approx(0.0, abs=1e-6)
    mine[1, 0, 2] += 3
    assert distillation_loss(mine, teacher, 2.0) > 0.01


def test_words_of_a_passage_by_depth() -> None:
    model = add_skimming(tiny("bert", "qa"))
    undecided_predictors(model)
    kind = kind_of(TASKS["squad"], doc_stride=2)
    found = read_passage(model, word_tokenizer(), kind, question(), max_length=10)
    words = [PASSAGE[start:end] for start, end, _ in found.words]
    assert words == ["dog", "runs", ".", "happy", "cat", "sleeps", ",", "sad", "dog", "sleeps"]
    depths = {depth for _, _, depth in found.words}
    assert len(depths) > 1 and depths <= {0, 1, 2, 3}
    text = passage_text(found, 3)
    assert text.plain == PASSAGE and found.answer is not None
    assert [PASSAGE[s.start : s.end] for s in text.spans if "underline" in str(s.style)] == [found.answer.text]


# Commands


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    tiny("bert", "mlm").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_a_run_from_start_to_finish(tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_squad(tmp_path / "train-v2.0.json", animals(40, unanswerable=True))
    write_squad(tmp_path / "dev-v2.0.json", animals(9, unanswerable=True))
    run, figures, page = tmp_path / "run", tmp_path / "figures.json", tmp_path / "page.html"
    given = ["--task", "squad2", "--data", str(tmp_path), "--max-length", "20", "--doc-stride", "4"]
    quick = ["--batch-size", "8", "--epochs", "2", "--dense-epochs", "2"]
    quick += ["--flops-speedup", "1", "--bias-init", "1", "--limit", "30"]
    train = ["train", "--backbone", str(backbone), "--output", str(run), *given, *quick]
    assert main(train) == 0
    document = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert document["rows"] == {"train": 27, "held_out": 3, "dev": 9}
    assert set(document["dense_dev"]["metrics"]) == {"f1", "exact_match", "f1_answerable", "f1_unanswerable"}
    saved = json.loads((run / "model/config.json").read_text(encoding="utf-8"))
    assert saved["no_answer_threshold"] == document["calibration"]["no_answer_threshold"]
    assert main([*train, "--resume"]) == 0
    again = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert again["dev"]["threshold"] == document["dev"]["threshold"]
    evaluate = ["evaluate", "--model", str(run), *given, "--repeats", "1", "--check-training-forward"]
    capsys.readouterr()
    assert main([*evaluate, "--json", str(figures), "--html", str(page), "--answers", str(tmp_path / "a.json")]) == 0
    assert set(json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))) == set(map(str, range(9)))
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert f"SQuAD v2.0, dev, {found['examples']} windows" in capsys.readouterr().out
    assert found["examples"] > 9
    assert found["metrics"] == document["dev"]["threshold"]["metrics"]
    assert found["training_forward"]["max_difference"] <= 1e-4 * found["training_forward"]["max_logit"]
    assert found["wall_clock_speedup"] > 0
    assert len(re.findall(r"\(gold: ", page.read_text(encoding="utf-8"))) == 9
    assert main(["evaluate", "--model", str(run), "--task", "sst2", "--data", str(tmp_path)]) == 2
    assert "is a BertForQuestionAnswering, SST-2 needs a model ForSequenceClassification" in capsys.readouterr().err


def test_recipes() -> None:
    recipe = recipe_of("published", TASKS["squad2"])
    assert (recipe.max_length, recipe.doc_stride, recipe.learning_rate, recipe.epochs) == (384, 128, 3e-5, 5.0)
    assert (recipe.decision, recipe.skim_weight) == ("sample", 0.8)
    with pytest.raises(ValueError, match=r"--doc-stride 8: is for questions; RTE is not read in windows"):
        recipe_of("corrected", TASKS["rte"], doc_stride=8)
    with pytest.raises(ValueError, match=r"--doc-stride -1: must be at least 0"):
        recipe_of("corrected", TASKS["squad"], doc_stride=-1)
