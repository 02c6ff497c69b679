"""The generated parts of docs/paper.md: the paper's tables beside ours, and what recomputing them says.

`paper.json` is a transcription of the paper; everything else here is computed from it and from `accuracy.csv`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transkimmer.flops import EncoderShape

from .accuracy import results as accuracy_results
from .accuracy.plots import WANTED
from .accuracy.results import Configuration, Row
from .accuracy.tables import percent, times
from .markdown import NOTHING, head, line

PAPER = Path(__file__).with_name("paper.json")
NOT_RUN = "not run"
BERT_BASE = EncoderShape(12, 768, 3072, 768)
BERT_BASE_PARAMETERS = 109_482_240  # embeddings and pooler included
PADDED_TO = 128  # what GLUE is padded to by the published scripts
# The paper's DistilBERT and so on against ours by name; everything else stands beside its BERT-base.
_FAMILIES = ("distilbert", "roberta", "albert")
# The points that stand for a mode, fixed beforehand: none is picked by its accuracy on the development rows.
_CORRECTED = ("corrected", "threshold", 2.0)
_PUBLISHED = ("published", "sample", None)


def load() -> dict[str, Any]:
    return json.loads(PAPER.read_text(encoding="utf-8"))


def blocks(rows: Sequence[Row]) -> dict[str, str]:
    """Name of the marker -> what stands between it and its end."""
    paper, found = load(), accuracy_results.configurations(rows)
    others = [result_lines(paper, found, paper["glue"][family], family) for family in _FAMILIES]
    tables = {
        "data": data_lines(paper),
        "glue": result_lines(paper, found, paper["glue"]["bert"], "bert"),
        "backbones": [part for table in others for part in (*table, "")][:-1],
        "long": result_lines(paper, found, paper["long"]["bert"], "bert"),
        "padding": padding_lines(paper),
        "averages": average_lines(paper),
    }
    return {name: "\n".join(lines) + "\n" for name, lines in tables.items()}


def data_lines(paper: dict[str, Any]) -> list[str]:
    """The paper's Table 2."""
    lines = head(("task", "tokens, mean", "padded to", "λ"))
    for data in paper["data"].values():
        lines.append(line([data["title"], str(data["tokens"]), str(data["padded_to"]), f"{data['skim_weight']:g}"]))
    return lines


def result_lines(
    paper: dict[str, Any], found: Sequence[Configuration], tasks: dict[str, dict[str, Any]], family: str
) -> list[str]:
    """One backbone of the paper's Table 3 or 4, with a line for each of our backbones that was run on the task."""
    base = paper["dense_speedup"][family]
    padded = any("padded_speedup" in figures for figures in tasks.values())
    name = {"bert": "BERT", "distilbert": "DistilBERT", "albert": "ALBERT", "roberta": "RoBERTa"}[family]
    heads = ["task", f"paper: {name}", "Transkimmer", "FLOPs ×", *(["padded ×"] if padded else [])]
    lines = head([*heads, "ours", "dense", "corrected", "FLOPs ×", "published", "FLOPs ×"])
    for task, figures in tasks.items():
        speedup = f"{figures['speedup']:.2f}" + ("" if base == 1 else f" ({figures['speedup'] / base:.2f})")
        cells = [paper["data"][task]["title"], _figure(figures["dense"]), _figure(figures["skimming"]), speedup]
        cells += [f"{figures['padded_speedup']:.2f}"] if padded else []
        own = _our_cells(found, task, family)
        lines += [line([*cells, *own[0]]), *(line([*[""] * len(cells), *more]) for more in own[1:])]
    return lines


def _figure(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}"


def _our_cells(found: Sequence[Configuration], task: str, family: str) -> list[list[str]]:
    lines = []
    for (own, backbone, metric), group in accuracy_results.panels(found).items():
        if own == task and _family(backbone) == family:
            cells = [f"{backbone}, {metric}", percent(accuracy_results.dense(group))]
            for wanted in (_CORRECTED, _PUBLISHED):
                point = _chosen(group, wanted)
                weight = "" if point is None or wanted != _PUBLISHED else f" (λ {point.skim_weight:g})"
                cells += (
                    [NOT_RUN, NOTHING] if point is None else [percent(point.mean("value")) + weight, _speedup(point)]
                )
            lines.append(cells)
    return lines or [[NOT_RUN, *[NOTHING] * 5]]


def _chosen(group: Iterable[Configuration], wanted: tuple[str, str, float | None]) -> Configuration | None:
    """With the mode's own settings: rather one that was not pruned in training, then of the speedup nearest to 2."""
    found = [one for one in group if (one.mode, one.decision, one.calibrated_to) == wanted]
    return min(found, key=lambda one: (bool(one.pruned), _apart(one)), default=None)


def _apart(point: Configuration) -> float:
    speedup = point.mean("flops_speedup")
    assert speedup is not None  # the column is never empty
    return abs(speedup.value - WANTED)


def _speedup(point: Configuration) -> str:
    return times(point.mean("flops_speedup"))


def _family(backbone: str) -> str:
    return next((family for family in _FAMILIES if family in backbone.lower()), "bert")


def layer_macs(tokens: int) -> int:
    return int(BERT_BASE.layer_macs(torch.tensor(tokens)))


def tokens_of(macs: float) -> float:
    """How many tokens (a real number) a layer of BERT-base spends `macs` multiply-adds on."""
    a, b = 2 * BERT_BASE.hidden, 12 * BERT_BASE.hidden**2
    return (-b + math.sqrt(b * b + 4 * a * macs)) / (2 * a)


def padding_lines(paper: dict[str, Any]) -> list[str]:
    """Whether "Sequence" follows from "No padding" and the FLOPs of a dense run, padded and of the mean length."""
    heads = ("task", "tokens", "padded to", "no padding ×", "padded ×, printed", "padded ×, recomputed")
    lines = head((*heads, "printed ÷ recomputed", f"tokens that padding to {PADDED_TO} would need"))
    for task, figures in paper["glue"]["bert"].items():
        data = paper["data"][task]
        dense = layer_macs(data["tokens"])
        padded = figures["speedup"] * layer_macs(data["padded_to"]) / dense
        implied = tokens_of(figures["speedup"] * layer_macs(PADDED_TO) / figures["padded_speedup"])
        cells = [data["title"], str(data["tokens"]), str(data["padded_to"]), f"{figures['speedup']:.2f}"]
        cells += [f"{figures['padded_speedup']:.2f}", f"{padded:.2f}"]
        lines.append(line([*cells, f"**{figures['padded_speedup'] / padded:.2f}**", f"{implied:.1f}"]))
    return lines


def average_lines(paper: dict[str, Any]) -> list[str]:
    """The paper's summary claims, and what its own rows give."""
    claims, glue = paper["claims"], paper["glue"]["bert"]
    rows = list(glue.values())
    others = [figures for task, figures in glue.items() if task != "wnli"]
    heads = ("claim", "printed", "mean of its rows", "geometric mean", "without WNLI")
    lines = head(heads)
    for name, column, claim in (
        ("speedup on GLUE, no padding", "speedup", claims["glue_speedup"]),
        ("speedup on GLUE, padded", "padded_speedup", claims["glue_padded_speedup"]),
    ):
        values, rest = ([figures[column] for figures in chosen] for chosen in (rows, others))
        found = (statistics.fmean(values), statistics.geometric_mean(values), statistics.fmean(rest))
        lines.append(line([name, f"{claim:.2f}", *(f"{value:.2f}" for value in found)]))
    roberta = [figures["speedup"] for figures in paper["glue"]["roberta"].values()]
    lines += ["", f"RoBERTa's rows average {statistics.fmean(roberta):.2f}.", ""]
    everything = glue | paper["long"]["bert"]
    losses = {task: figures["dense"] - figures["skimming"] for task, figures in everything.items()}
    above = [
        f"{paper['data'][task]['title']} ({loss:.1f})"
        for task, loss in losses.items()
        if loss > 100 * claims["accuracy_loss_below"] + 1e-9
    ]
    lines += [
        f"Points lost, where it is more than the claimed {claims['accuracy_loss_below']:.0%}: {', '.join(above)}.",
        "",
    ]
    return [*lines, *predictor_lines(claims)]


def predictor_lines(claims: dict[str, float]) -> list[str]:
    """What a predictor of the hidden size's width costs before anything is skimmed."""
    d = BERT_BASE.hidden
    parameters = BERT_BASE.layers * (d * d + d + 2 * d + 2 + 4 * d)
    lines = head(("predictors of BERT-base", "printed", "recomputed"))
    share = parameters / BERT_BASE_PARAMETERS
    lines.append(line(["share of its parameters", f"{claims['predictor_parameters']:.1%}", f"{share:.2%}"]))
    flops = {n: predictor_share(n) for n in (11, 128, 256, 512)}
    cell = ", ".join(f"{share:.2%} of {n} tokens" for n, share in flops.items())
    return [*lines, line(["share of its FLOPs", f"{claims['predictor_flops']:.1%}", cell])]


def predictor_share(tokens: int) -> float:
    """As the paper counts it: every token scored, the first included."""
    return tokens * (BERT_BASE.hidden * BERT_BASE.predictor + 2 * BERT_BASE.predictor) / layer_macs(tokens)
