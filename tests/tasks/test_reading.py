"""Rows of every task, from files of the official format, written for the purpose, and from the hub's columns."""

from __future__ import annotations

import lzma
from pathlib import Path

import datasets
import pytest
import torch
from transkimmer.data import Example, TokenizedExamples, padded_batches
from transkimmer.demo import sentences as demo_sentences
from transkimmer.tasks import TASKS, TEXT_TASKS, load_split, score, task_named

from ..models.words import word_tokenizer

MNLI_HEADER = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
MNLI_HEADER += "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
PAIR_HEADER = "index\tsentence1\tsentence2\tlabel\n"
# Per task: file, content, and the examples it stands for.
FILES = {
    "cola": (
        "train.tsv",
        'gj04\t0\t*\tThe "box slept.\ngj04\t1\t\tIt fell.\n',
        [('The "box slept.', 0), ("It fell.", 1)],
    ),
    "rte": (
        "train.tsv",
        PAIR_HEADER + "0\ta b\tc\tnot_entailment\n1\td\te\tentailment\n",
        [("a b", 1, "c"), ("d", 0, "e")],
    ),
    "qqp": (
        "train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n7\t1\t2\tWhy?\tWhy not?\t0\n8\t3\t4\tHow?\tHow so?\t1\n",
        [("Why?", 0, "Why not?"), ("How?", 1, "How so?")],
    ),
    "mrpc": (
        "msr_paraphrase_train.txt",
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t10\t11\tHe said.\tSaid he.\n",
        [("He said.", 1, "Said he.")],
    ),
    "sst2": ("train.tsv.xz", 'sentence\tlabel\nun film "étrange \t1\n', [('un film "étrange ', 1)]),
    "mnli": (
        "train.tsv",
        MNLI_HEADER + "0\t1\t1n\tfiction\t-\t-\t-\t-\tp\th\tneutral\tneutral\n"
        "1\t2\t2c\tfiction\t-\t-\t-\t-\tq\ti\tneutral\tcontradiction\n",
        [("p", 1, "h"), ("q", 2, "i")],
    ),
    "wnli": ("train.tsv", PAIR_HEADER + "0\ta\tb\t1\n", [("a", 1, "b")]),
    "qnli": (
        "train.tsv",
        "index\tquestion\tsentence\tlabel\n0\tWho?\tShe did.\tentailment\n1\tWhen?\tIt rained.\tnot_entailment\n",
        [("Who?", 0, "She did."), ("When?", 1, "It rained.")],
    ),
    "stsb": (
        "sts-train.tsv",
        "genre\tfilename\tyear\tindex\tscore\tsentence1\tsentence2\nm\tf\t2012\t1\t3.800\ta\tb\n",
        [("a", 3.8, "b")],
    ),
    "yelp": ("train.tsv", "stars\ttext\n5\tGood.\n1\tBad.\n", [("Good.", 4), ("Bad.", 0)]),
    "imdb": ("train.tsv", "id\tlabel\tstars\ttext\n0\t1\t9\tFun.\n", [("Fun.", 1)]),
}


def write(folder: Path, name: str, content: str) -> Path:
    data = content.encode()
    (folder / name).write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    return folder / name


def examples_of(rows: list[tuple]) -> list[Example]:
    return [Example(*row) for row in rows]


@pytest.mark.parametrize("name", FILES)
def test_official_files(tmp_path: Path, name: str) -> None:
    file, content, rows = FILES[name]
    write(tmp_path, file, content)
    assert load_split(TASKS[name], "train", tmp_path) == examples_of(rows)


def test_newsgroups_are_a_folder_per_class(tmp_path: Path) -> None:
    task = TASKS["20news"]
    for group, number in (("sci.med", 7), ("alt.atheism", 3)):
        folder = tmp_path / "20news-bydate-test" / group
        folder.mkdir(parents=True)
        (folder / str(number)).write_bytes(f"Subject: {group} caf\xe9".encode("latin-1"))
    examples = load_split(task, "dev", tmp_path)
    assert [(e.text, task.classes[int(e.label)]) for e in examples] == [
        ("Subject: alt.atheism café", "alt.atheism"),
        ("Subject: sci.med café", "sci.med"),
    ]
    (tmp_path / "20news-bydate-test" / "sci.fi").mkdir()
    with pytest.raises(ValueError, match=r"sci\.fi: is none of the 20 classes of 20News"):
        load_split(task, "dev", tmp_path)


def test_every_task_is_read() -> None:
    assert set(FILES) | {"20news"} == set(TEXT_TASKS)
    with pytest.raises(ValueError, match=r"--task boolq: must be one of cola, rte"):
        task_named("boolq")


def test_a_folder_of_several_tasks(tmp_path: Path) -> None:
    (tmp_path / "SST-2").mkdir()
    write(tmp_path / "SST-2", "dev.tsv", "sentence\tlabel\nflat\t0\n")
    assert load_split(TASKS["sst2"], "dev", tmp_path) == [Example("flat", 0)]


def test_the_sentences_that_come_along() -> None:
    sentences = demo_sentences()
    assert len(sentences) == 872 and sum(sentence.label for sentence in sentences) == 444


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("sst2", "", r"train\.tsv: is empty"),
        ("sst2", "sentence\tlabel\n", r"train\.tsv: has no rows"),
        ("sst2", "sentence\nflat\n", r"train\.tsv, line 1: no column 'label' in the header \['sentence'\]"),
        ("sst2", "sentence\tlabel\nfine\t1\nflat\t2\n", r"train\.tsv, line 3: label '2': must be one of 0, 1"),
        ("sst2", "sentence\tlabel\nflat\n", r"train\.tsv, line 2: has 1 columns, but SST-2 needs 2"),
        ("rte", PAIR_HEADER + "0\ta\tb\tmaybe\n", r"line 2: label 'maybe': must be one of entailment, not_entailment"),
        ("yelp", "stars\ttext\n0\tx\n", r"line 2: label '0': must be one of 1, 2, 3, 4, 5"),
        ("stsb", "score\tsentence1\tsentence2\n5.1\ta\tb\n", r"line 2: score '5.1': must be a number from 0 to 5"),
        ("stsb", "score\tsentence1\tsentence2\n-0.1\ta\tb\n", r"line 2: score '-0.1': must be a number from 0 to 5"),
        ("stsb", "score\tsentence1\tsentence2\nnan\ta\tb\n", r"line 2: score 'nan': must be a number from 0 to 5"),
        ("cola", "gj04\t1\t\n", r"line 1: has 3 columns, but CoLA needs 4"),
        ("cola", "", r"train\.tsv: has no rows"),
    ],
)
def test_bad_files(tmp_path: Path, task: str, content: str, message: str) -> None:
    write(tmp_path, "train.tsv", content)
    with pytest.raises(ValueError, match=message):
        load_split(TASKS[task], "train", tmp_path)


@pytest.mark.parametrize("damage", ["cut short", "no UTF-8"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    content = b"sentence\tlabel\n" + b"fine\t1\n" * 2000
    whole = lzma.compress(content) if damage == "cut short" else content + b"\xff\xfe\t1\n"
    name = "train.tsv.xz" if damage == "cut short" else "train.tsv"
    (tmp_path / name).write_bytes(whole[:-20] if damage == "cut short" else whole)
    with pytest.raises(ValueError, match=r"train\.tsv.*, after line \d+: "):
        load_split(TASKS["sst2"], "train", tmp_path)


def test_known_broken_rows_are_left_out_and_told(tmp_path: Path) -> None:
    name, content, rows = FILES["qqp"]
    write(tmp_path, name, content + "9\t5\t6\tcut off\n")
    with pytest.warns(UserWarning, match=r"train\.tsv: 1 rows with missing columns left out"):
        assert load_split(TASKS["qqp"], "train", tmp_path) == examples_of(rows)


def test_development_rows_of_a_file_that_holds_both_are_left_out(tmp_path: Path) -> None:
    """GLUE's development rows of MRPC are some of Microsoft's training rows."""
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    rows = ["1\t1\t2\tHe said.\tSaid he.\n", "0\t3\t4\tIt fell.\tIt rose. \n", "1\t5\t6\tHe said.\tHe did.\n"]
    path = write(tmp_path, "msr_paraphrase_train.txt", "\ufeff" + header + "".join(rows))
    texts = [("He said.", 1, "Said he."), ("It fell.", 0, "It rose. "), ("He said.", 1, "He did.")]
    examples = examples_of(texts)
    assert load_split(TASKS["mrpc"], "train", tmp_path) == examples
    dev = write(tmp_path, "dev.tsv", header + rows[1].replace(" \n", "\n"))
    with pytest.warns(UserWarning, match=f"{path}: 1 rows left out, which are development rows in {dev}"):
        assert load_split(TASKS["mrpc"], "train", tmp_path) == [examples[0], examples[2]]
    assert len(load_split(TASKS["mrpc"], "dev", tmp_path)) == 1
    write(tmp_path, "dev.tsv", header + rows[0])  # another pair begins with the same text
    with pytest.warns(UserWarning, match="1 rows left out"):
        assert load_split(TASKS["mrpc"], "train", tmp_path) == examples[1:]
    write(tmp_path, "train.tsv", header + rows[1])  # GLUE's own is taken as it is
    assert load_split(TASKS["mrpc"], "train", tmp_path) == [examples[1]]


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none: no such folder"):
        load_split(TASKS["rte"], "train", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has none of dev\.tsv, dev\.tsv\.xz"):
        load_split(TASKS["rte"], "dev", tmp_path)
    with pytest.raises(ValueError, match=r"split 'test': RTE has train, dev"):
        load_split(TASKS["rte"], "test", tmp_path)


# The hub


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: str, split: str) -> datasets.Dataset:
        asked.append((*names, split))
        return datasets.Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "label": [1], "idx": [0]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_split(TASKS["rte"], "dev") == [Example("a", 1, "b")]
    assert asked == [("nyu-mll/glue", "rte", "validation")]
    with pytest.raises(ValueError, match=r"nyu-mll/glue/qqp: no column 'question1', 'question2'"):
        load_split(TASKS["qqp"], "dev")
    with pytest.raises(ValueError, match=r"split 'test': RTE has train, dev on the hub"):
        load_split(TASKS["rte"], "test")


def test_unlabelled_hub_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0, -1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: rows)
    with pytest.raises(ValueError, match=r"nyu-mll/glue/cola, row 1: label -1: must be one of 0, 1"):
        load_split(TASKS["cola"], "train")


def test_a_hub_out_of_reach_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*names: str, split: str) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(OSError, match=r"SetFit/20_newsgroups: not to be had from the hub \(offline\).*--data DIR"):
        load_split(TASKS["20news"], "train")


# Tokens


def test_long_texts_are_cut_and_told() -> None:
    examples = [Example("un happy dog", 1, "happy happy happy dog"), Example("dog", 0, "dog")]
    with pytest.warns(UserWarning, match=r"1 of 2 texts are cut to 8 tokens"):
        tokenized = TokenizedExamples(examples, word_tokenizer(), max_length=8)
    assert [len(ids) for ids in tokenized.input_ids] == [8, 5]
    batch = next(padded_batches(tokenized, word_tokenizer(), 2, sort=True))
    assert batch["labels"].tolist() == [0, 1]
    assert batch["token_type_ids"].tolist()[0] == [0, 0, 0, 1, 1, 0, 0, 0]
    assert batch["attention_mask"].sum(1).tolist() == [5, 8]


def test_a_missing_second_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 have a second text"):
        TokenizedExamples([Example("a", 0, "b"), Example("c", 1)], word_tokenizer())


# Metrics


def test_metrics() -> None:
    labels, predictions = torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 0, 0])
    found = score(labels, predictions, ("accuracy", "f1", "matthews"))
    assert found == pytest.approx({"accuracy": 0.75, "f1": 2 / 3, "matthews": 1 / 3**0.5})
    numbers = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert score(numbers, numbers**3, ("spearman",)) == {"spearman": pytest.approx(1.0)}
    assert score(numbers, 2 * numbers + 1, ("pearson",)) == {"pearson": pytest.approx(1.0)}
    assert score(numbers, torch.ones(4), ("pearson", "spearman")) == {"pearson": 0.0, "spearman": 0.0}
    far = score(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 30.0]), ("pearson", "spearman"))
    assert far == pytest.approx({"pearson": 0.8101, "spearman": 1.0}, abs=1e-4)


def test_a_single_row_correlates_with_nothing() -> None:
    """A small data set holds out no more, which is no reason to fail after all the training."""
    one = torch.tensor([3.5])
    assert score(one, one, ("pearson", "spearman")) == {"pearson": 0.0, "spearman": 0.0}
