"""The tasks that skimming models are trained and judged on: where their rows come from and what counts as right."""

from .metrics import METRICS, score
from .reading import load_split
from .table import QUESTION_TASKS, TASKS, TEXT_TASKS, QuestionTask, Task, TextTask, task_named

__all__ = [
    "METRICS",
    "QUESTION_TASKS",
    "TASKS",
    "TEXT_TASKS",
    "QuestionTask",
    "Task",
    "TextTask",
    "load_split",
    "score",
    "task_named",
]
