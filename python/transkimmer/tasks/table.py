"""The one table of tasks. Adding a task is adding a row; how files and hub data are read follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every task has.

    Attributes:
        name: as in `--task`.
        title: as printed.
        hub: arguments of `datasets.load_dataset`.
        metrics: names of the metrics; the first is the one that is compared.
        files: per split, names that its official file goes by (each also with `.xz`), or of a folder per class.
        hub_splits: per split, its name on the hub.
        folder: name of its folder under a folder of several tasks; default: the title.
        padded_length: tokens that the paper pads the task to (Transkimmer, Table 2).
        paper_skim_weight: the lambda that the paper trains it with (Table 2).
        paper_epochs, paper_learning_rate: of the published scripts.
    """

    name: str
    title: str
    hub: tuple[str, ...]
    metrics: tuple[str, ...]
    files: Mapping[str, tuple[str, ...]]
    hub_splits: Mapping[str, str]
    folder: str = ""
    padded_length: int = 128
    paper_skim_weight: float = 0.5
    paper_epochs: int = 3
    paper_learning_rate: float = 2e-5

    @property
    def counted(self) -> str:
        """What an evaluation counts its tokens over."""
        return "rows"

    @property
    def metric(self) -> str:
        """The metric that is compared."""
        return self.metrics[0]

    @property
    def hub_name(self) -> str:
        """What the hub's rows are called in errors and in `run.json`."""
        return "/".join(self.hub)


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A text classification or regression task.

    Attributes:
        hub_columns: the text columns on the hub (one text or a pair), then the label's.
        classes: names of the classes in the order of the hub's label numbers; empty: a number is predicted.
        metrics: names of `METRICS`.
        columns: of the official files, likewise: names in the header, or positions where the files have none.
        file_labels: class number by what the file says; None: the numbers 0, 1, ... themselves.
        score_range: of a predicted number.
        skips_short_rows: whether the official file is known to have a few broken rows, which are left out.
        holds_dev: names of `files` of the training rows that hold the development rows as well, which are left out.
    """

    hub_columns: tuple[str, ...]
    classes: tuple[str, ...]
    columns: tuple[str, ...] | tuple[int, ...]
    file_labels: Mapping[str, int] | None = None
    score_range: tuple[float, float] = (0.0, 5.0)
    skips_short_rows: bool = False
    holds_dev: tuple[str, ...] = ()

    @property
    def is_regression(self) -> bool:
        return not self.classes

    @property
    def outputs(self) -> int:
        """Columns of the classifier's logits."""
        return len(self.classes) or 1


@dataclass(frozen=True, kw_only=True)
class QuestionTask(Task):
    """Extractive question answering: the answer to a question is a span of its passage.

    Attributes:
        has_unanswerable: whether some questions have no answer there (SQuAD v2.0).
        max_length, doc_stride: tokens of a window on a long passage, and how many of them neighbouring windows share,
            where nothing else is asked for.
    """

    has_unanswerable: bool
    max_length: int = 384
    doc_stride: int = 128

    @property
    def counted(self) -> str:
        return "windows"


_GLUE = "nyu-mll/glue"
_TSV = {"train": ("train.tsv",), "dev": ("dev.tsv",)}
_ENTAILMENT = ("entailment", "not_entailment")
_GLUE_SPLITS = {"train": "train", "dev": "validation"}
_TEST_IS_DEV = {"train": "train", "dev": "test"}  # no development split: the paper reports these on the test split
_SQUAD_METRICS = ("f1", "exact_match")
_PAIR = ("sentence1", "sentence2", "label")
_NEWSGROUPS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"),
    *("comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
    *("sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns"),
    *("talk.politics.mideast", "talk.politics.misc", "talk.religion.misc"),
)


def _numbered(names: tuple[str, ...]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


TEXT_TASKS: dict[str, TextTask] = {
    task.name: task
    for task in (
        TextTask(
            name="cola",
            title="CoLA",
            hub=(_GLUE, "cola"),
            hub_columns=("sentence", "label"),
            classes=("unacceptable", "acceptable"),
            metrics=("matthews", "accuracy"),
            columns=(3, 1),
            files=_TSV,
            hub_splits=_GLUE_SPLITS,
            padded_length=64,
            paper_skim_weight=0.3,
        ),
        TextTask(
            name="rte",
            title="RTE",
            hub=(_GLUE, "rte"),
            hub_columns=_PAIR,
            classes=_ENTAILMENT,
            metrics=("accuracy",),
            columns=_PAIR,
            files=_TSV,
            hub_splits=_GLUE_SPLITS,
            file_labels=_numbered(_ENTAILMENT),
            padded_length=256,
            paper_skim_weight=0.8,
        ),
        TextTask(
            name="qqp",
            title="QQP",
            hub=(_GLUE, "qqp"),
            hub_columns=("question1", "question2", "label"),
            classes=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            columns=("question1", "question2", "is_duplicate"),
            files=_TSV,
            hub_splits=_GLUE_SPLITS,
            skips_short_rows=True,
            paper_skim_weight=0.2,
        ),
        TextTask(
            name="mrpc",
            title="MRPC",
            hub=(_GLUE, "mrpc"),
            hub_columns=_PAIR,
            classes=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            columns=("#1 String", "#2 String", "Quality"),
            files={
                "train": ("train.tsv", "msr_paraphrase_train.txt"),
                "dev": ("dev.tsv",),
                "test": ("msr_paraphrase_test.txt",),
            },
            hub_splits=_GLUE_SPLITS | {"test": "test"},
            holds_dev=("msr_paraphrase_train.txt",),  # 4076 rows: GLUE's 3668 and its 408 development rows
            paper_epochs=5,
        ),
        TextTask(
            name="sst2",
            title="SST-2",
            hub=(_GLUE, "sst2"),
            hub_columns=("sentence", "label"),
            classes=("negative", "positive"),
            metrics=("accuracy",),
            columns=("sentence", "label"),
            files=_TSV,
            hub_splits=_GLUE_SPLITS,
            padded_length=64,
            paper_skim_weight=0.3,
        ),
        TextTask(
            name="mnli",
            title="MNLI",
            hub=(_GLUE, "mnli"),
            hub_columns=("premise", "hypothesis", "label"),
            classes=("entailment", "neutral", "contradiction"),
            metrics=("accuracy",),
            columns=("sentence1", "sentence2", "gold_label"),
            files={
                "train": ("train.tsv",),
                "dev": ("dev_matched.tsv",),
                "dev-mismatched": ("dev_mismatched.tsv",),
            },
            hub_splits={
                "train": "train",
                "dev": "validation_matched",
                "dev-mismatched": "validation_mismatched",
            },
            file_labels=_numbered(("entailment", "neutral", "contradiction")),
            paper_skim_weight=0.2,
        ),
        TextTask(
            name="wnli",
            title="WNLI",
            hub=(_GLUE, "wnli"),
            hub_columns=_PAIR,
            classes=("not_entailment", "entailment"),
            metrics=("accuracy",),
            columns=_PAIR,
            files=_TSV,
            hub_splits=_GLUE_SPLITS,
            paper_epochs=5,
        ),
        TextTask(
            name="qnli",
            title="QNLI",
            hub=(_GLUE, "qnli"),
            hub_columns=("question", "sentence", "label"),
            classes=_ENTAILMENT,
            metrics=("accuracy",),
            columns=("question", "sentence", "label"),
            files=_TSV,
            hub_splits=_GLUE_SPLITS,
            file_labels=_numbered(_ENTAILMENT),
            paper_skim_weight=0.1,
        ),
        TextTask(
            name="stsb",
            title="STS-B",
            hub=(_GLUE, "stsb"),
            hub_columns=_PAIR,
            classes=(),
            metrics=("pearson", "spearman"),
            columns=("sentence1", "sentence2", "score"),
            files={
                "train": ("train.tsv", "sts-train.tsv"),
                "dev": ("dev.tsv", "sts-dev.tsv"),
                "test": ("sts-test.tsv",),
            },
            hub_splits=_GLUE_SPLITS,
            padded_length=64,
            paper_skim_weight=0.3,
        ),
        TextTask(
            name="20news",
            title="20News",
            hub=("SetFit/20_newsgroups",),  # without headers, footers and quotes, which the files have
            hub_columns=("text", "label"),
            classes=_NEWSGROUPS,
            metrics=("accuracy",),
            columns=("text", "label"),
            files={"train": ("20news-bydate-train",), "dev": ("20news-bydate-test",)},
            hub_splits=_TEST_IS_DEV,
            file_labels=_numbered(_NEWSGROUPS),
            padded_length=512,
            paper_epochs=5,
            paper_learning_rate=3e-5,
        ),
        TextTask(
            name="yelp",
            title="Yelp",
            hub=("Yelp/yelp_review_full",),
            hub_columns=("text", "label"),
            classes=("1 star", "2 stars", "3 stars", "4 stars", "5 stars"),
            metrics=("accuracy",),
            columns=("text", "stars"),
            files={
                "train": ("train.tsv", "train5k_full5star.tsv"),
                "dev": ("dev.tsv", "dev5k_5star.tsv"),
                "test": ("test.tsv", "test5k_5star.tsv"),
            },
            hub_splits=_TEST_IS_DEV,
            file_labels=_numbered(("1", "2", "3", "4", "5")),
            padded_length=512,
            paper_epochs=2,
            paper_learning_rate=3e-5,
        ),
        TextTask(
            name="imdb",
            title="IMDB",
            hub=("stanfordnlp/imdb",),
            hub_columns=("text", "label"),
            classes=("negative", "positive"),
            metrics=("accuracy",),
            columns=("text", "label"),
            files={"train": ("train.tsv",), "dev": ("test.tsv",)},
            hub_splits=_TEST_IS_DEV,
            padded_length=512,
        ),
    )
}

QUESTION_TASKS: dict[str, QuestionTask] = {
    task.name: task
    for task in (
        QuestionTask(
            name="squad",
            title="SQuAD v1.1",
            hub=("rajpurkar/squad",),
            metrics=_SQUAD_METRICS,
            files={
                "train": ("train-v1.1.json", "squad-v1.1-train.json"),
                "dev": ("dev-v1.1.json", "squad-v1.1-dev.json"),
            },
            hub_splits=_GLUE_SPLITS,
            folder="SQuAD",
            has_unanswerable=False,
            padded_length=384,
            paper_skim_weight=0.8,
            paper_epochs=5,
            paper_learning_rate=3e-5,
        ),
        QuestionTask(
            name="squad2",
            title="SQuAD v2.0",
            hub=("rajpurkar/squad_v2",),
            metrics=(*_SQUAD_METRICS, "f1_answerable", "f1_unanswerable"),
            files={
                "train": ("train-v2.0.json", "squad-v2.0-train.json"),
                "dev": ("dev-v2.0.json", "squad-v2.0-dev.json"),
            },
            hub_splits=_GLUE_SPLITS,
            folder="SQuAD",
            has_unanswerable=True,
            padded_length=384,
            paper_skim_weight=0.8,
            paper_epochs=5,
            paper_learning_rate=3e-5,
        ),
    )
}

TASKS: dict[str, Task] = {**TEXT_TASKS, **QUESTION_TASKS}


def task_named(name: str) -> Task:
    """The task of that name; ValueError lists those there are."""
    if name not in TASKS:
        raise ValueError(f"--task {name}: must be one of {', '.join(TASKS)}")
    return TASKS[name]
