"""What the bench command prints besides its figures: on what they were had, and whether to trust them."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transkimmer.bench import command, show, workload
from transkimmer.bench.contenders import Contender
from transkimmer.bench.timing import Row, relative_spread, time_in_turn

from transkimmer_kernels import cpu_products, native

from ..models.tiny import VOCABULARY

ROW = Row("skimming", None, 0.5, 2.0, 2.0, 1.9, 0.95, 1.0, 1.0, 0.02, 3)


def _printed(*spreads: float | None) -> str:
    console = Console(file=io.StringIO(), width=150)
    show.print_table(console, [replace(ROW, name=f"row {i}", spread=s) for i, s in enumerate(spreads)], "a title")
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_every_column_has_its_own_figure() -> None:
    table = show.table_of([Row("x", 0.91, 0.42, 2.03, 2.14, 1.95, 0.96, 0.87, 1.5, 0.08, 3)], "")
    assert {column.header: next(iter(column.cells)) for column in table.columns} == {
        **{"": "x", "accuracy": "91.00%", "tokens kept": "42.0%", "FLOPs ×": "2.03", "paper's": "2.14"},
        **{"wall-clock ×": "1.95", "skim efficiency": "0.96", "agreement": "87.0%", "median": "1.500 s", "±": "8%"},
    }


def test_a_disturbed_run_says_so() -> None:
    assert "measured again" not in _printed(0.02, 0.15)
    assert "Repeats of 'row 1' lie 326% apart" in _printed(0.02, 3.26, 0.2)


def test_a_single_round_has_no_spread() -> None:
    assert relative_spread([2.0]) is None and relative_spread([1.0, 2.0, 2.0]) == 0.5
    printed = _printed(None, 0.02)
    assert "│  – │" in printed.replace("┃", "│") and "2%" in printed and "measured again" not in printed


def test_depths_are_numbers_where_there_is_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        show, "word_depths", lambda *_: ([show.Word("good", 2), show.Word("film", 0), show.Word("!", 1, False)], 1)
    )
    model = type("Model", (), {"config": type("Config", (), {"num_hidden_layers": 2})})
    texts = {}
    for terminal in (False, True):
        console = Console(file=io.StringIO(), width=150, force_terminal=terminal, color_system="truecolor")
        if not terminal:
            console = Console(file=io.StringIO(), width=150, force_terminal=False, _environ={})
        show.print_sentences(console, model, None, ["good film"], ["bad", "good"])  # type: ignore[arg-type]
        texts[terminal] = console.file.getvalue()  # type: ignore[attr-defined]
    assert "     good  good/2 film/0 !/1" in texts[False] and "\x1b" not in texts[False]
    assert "/" not in texts[True] and "\x1b" in texts[True]
    console = Console(file=io.StringIO(), width=150, color_system=None)
    show.print_sentences(console, model, None, ["good film!"], ["bad", "good"], [0])  # type: ignore[arg-type]
    assert "predicted good, gold bad\ngood/2" in console.file.getvalue()  # type: ignore[attr-defined]
    words = [show.Word("good", 2), show.Word("!", 1, False)]
    assert show.sentence_line(words, 2).plain == "good!"
    assert show.answer_names(3.25, 4.0, ()) == "predicted 3.25, gold 4.00"


def test_no_progress_bar_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    field = [Contender("a", lambda inputs: torch.zeros(1))]
    time_in_turn(field, workload.random_batches([3, 4], 2, 1, VOCABULARY), 1, "a")
    assert log.getvalue() == ""


def test_the_title_and_the_file_say_which_cpu_kernels_ran() -> None:
    assert command.cpu_kernels("reference", "fp32") == {}
    assert command._machine("reference", "fp32") == f"reference kernels, {torch.get_num_threads()} threads"
    if not native.status()["cpu"].loaded:
        pytest.skip(native.status()["cpu"].reason)
    isa, form = cpu_products.instruction_set(), cpu_products.choose_form(torch.float32)
    assert command.cpu_kernels("cpu", "fp32") == {"instruction_set": isa, "products": form}
    assert command._machine("cpu", "fp32") == f"{isa}, {form} products, {torch.get_num_threads()} threads"
