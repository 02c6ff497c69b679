"""Tables and coloured sentences, for the terminal and as one self-contained HTML file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures import layer_count
from ..records import record_skimming
from .timing import Row

SEPARATOR = "‖"  # between the texts of a pair
# Spread of repeats, (max - min) / median, from which a run is to be repeated; on a quiet machine it is 1 to 5 %.
DISTURBED = 0.15
# From words dropped before the first layer (faint) to words read by every layer (bold).
_RAMP = ("#bdbdbd", "#9ecae1", "#6baed6", "#3182bd", "#31a354", "#e6a000", "#e6550d", "#c51b1b")


def table_of(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in (
        "accuracy",
        "tokens kept",
        "FLOPs ×",
        "paper's",
        "wall-clock ×",
        "skim efficiency",
        "agreement",
        "median",
        "±",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            "–" if row.accuracy is None else f"{row.accuracy:.2%}",
            f"{row.tokens_kept:.1%}",
            f"{row.flops_speedup:.2f}",
            f"{row.paper_flops_speedup:.2f}",
            f"{row.wall_clock_speedup:.2f}",
            f"{row.skim_efficiency:.2f}",
            f"{row.agreement:.1%}",
            f"{row.median_s:.3f} s",
            spread_text(row.spread),
        )
    return table


def spread_text(spread: float | None) -> str:
    """`–` where it is not known, after a single round."""
    return "–" if spread is None else f"{spread:.0%}"


def print_table(console: Console, rows: Sequence[Row], title: str) -> None:
    """The table, and a warning below it where the machine was too busy for its figures to mean much."""
    console.print(table_of(rows, title))
    spread, name = max(((row.spread or 0.0, row.name) for row in rows), default=(0.0, ""))
    if spread > DISTURBED:
        console.print(
            f"Repeats of '{name}' lie {spread:.0%} apart: something else ran on this machine, and these "
            "figures should be measured again.",
            style="bold",
        )


class Word(NamedTuple):
    """depth: number of layers that read it; spaced: whether something stands between it and the word before."""

    text: str
    depth: int
    spaced: bool = True


@torch.no_grad()
def word_depths(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    pair: str | None = None,
    max_length: int | None = None,
) -> tuple[list[Word], int | float]:
    """(words, predicted class or, of a head with one output, number); a word is read as long as any piece of it.

    The words of a second text, `pair`, follow those of the first behind a word that stands for the separator.
    max_length: tokens that are read; None: as many as the tokenizer says.
    """
    encoding = tokenizer(text, pair, return_tensors="pt", truncation=True, max_length=max_length)
    with record_skimming() as records:
        logits = model(**encoding.to(model.device)).logits
    predicted = int(logits.argmax()) if logits.numel() > 1 else float(logits)
    depth = records[0].keep_masks[:, 0].sum(0)  # [seq]
    spans: dict[tuple[int, int], tuple[int, int, int]] = {}
    sequences = encoding.sequence_ids(0)
    for token, (which, word) in enumerate(zip(sequences, encoding.word_ids(0), strict=True)):
        if word is not None:
            start, end = encoding.token_to_chars(0, token)
            low, high, deepest = spans.get((which, word), (start, end, 0))
            spans[which, word] = (min(low, start), max(high, end), max(deepest, int(depth[token])))
    texts = (text, pair or "")
    words, former = [], (0, -1)
    for (which, _), (low, high, deepest) in spans.items():
        if former[0] != which:
            words.append(Word(SEPARATOR, int(depth[sequences.index(which) - 1])))
        words.append(Word(texts[which][low:high], deepest, former != (which, low)))
        former = which, high
    return words, predicted


def answer_names(predicted: float, gold: float | None, class_names: Sequence[str]) -> str:
    """`predicted negative, gold positive`; numbers where there are no classes, no gold where there is none."""
    parts = [("predicted", predicted)] + ([] if gold is None else [("gold", gold)])
    return ", ".join(f"{what} {class_names[int(x)] if class_names else f'{x:.2f}'}" for what, x in parts)


def colour(depth: int, layers: int) -> str:
    return _RAMP[round(depth / max(layers, 1) * (len(_RAMP) - 1))]


def sentence_line(words: Sequence[Word], layers: int, *, numbers: bool = False) -> Text:
    """Words coloured by depth; numbers: also the depth behind each, for where colours do not show."""
    line = Text()
    for word, depth, spaced in words:
        line.append(" " if line and (spaced or numbers) else "")
        line.append(
            f"{word}/{depth}" if numbers else word, style=f"{'bold ' if depth == layers else ''}{colour(depth, layers)}"
        )
    return line


def legend(layers: int) -> Text:
    line = Text("read by ")
    for depth in range(layers + 1):
        line.append(f" {depth} ", style=f"{'bold ' if depth == layers else ''}{colour(depth, layers)}")
    return line.append(" layers")


def print_sentences(
    console: Console,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | tuple[str, str | None]],
    class_names: Sequence[str],
    gold: Sequence[float] | None = None,
    max_length: int | None = None,
) -> None:
    """Prints texts, or pairs of them, each behind what the model takes it for; with `gold` below that and the label.

    class_names: none where a number is predicted. max_length: as in `word_depths`.
    """
    layers = layer_count(model.config)
    numbers = console.color_system is None
    if numbers:
        console.print(f"word/number of layers, of {layers}, that read it")
    else:
        console.print(legend(layers))
    for place, text in enumerate(texts):
        text, pair = (text, None) if isinstance(text, str) else text
        words, predicted = word_depths(model, tokenizer, text, pair, max_length)
        line = sentence_line(words, layers, numbers=numbers)
        if gold is None:
            console.print(Text(f"{class_names[int(predicted)]:>9}  ").append_text(line))
        else:
            console.print()
            console.print(Text(answer_names(predicted, gold[place], class_names), style="bold"))
            console.print(line)


def save_html(console: Console, path: str | os.PathLike[str]) -> None:
    """Writes what a recording console has printed; one file, no scripts, nothing loaded from elsewhere."""
    console.save_html(os.fspath(path), clear=False)
