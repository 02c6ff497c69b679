"""Markdown of `accuracy.csv`: docs/accuracy.md."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..markdown import NOTHING, head, line
from . import plots, results
from .results import Configuration, Mean

UNMEASURED = "Not measured yet: there is no row in `benchmarks/results/accuracy.csv`."
_HEADS = (
    *("training", "λ", "decision", "dev", "− dense", "held out", "FLOPs ×", "padded ×", "tokens kept"),
    *("wall-clock ×", "**skim efficiency**", "seeds"),
)
_FORWARD_HEADS = (
    "training",
    "λ",
    "dev, tokens removed",
    "dev, training forward",
    "same prediction",
    "largest difference",
    "seeds",
)


def page(rows: Sequence[results.Row], trials: Sequence[dict[str, str]] = ()) -> str:
    parts = [
        "# Accuracy on real tasks",
        "",
        "Generated from `benchmarks/results/accuracy.csv` by `make report`; [training.md](training.md) says what the",
        "modes are, [paper.md](paper.md) how the paper's figures compare.",
        "",
    ]
    if not rows:
        return "\n".join([*parts, UNMEASURED, *trial_lines(trials)]) + "\n"
    parts += [
        "Metrics are in percent, of the development rows and of held-out training rows, which the models were",
        "calibrated on. Figures are means over seeds ± their standard deviation (none: a single seed). `− dense` is",
        "the difference, in points, from the dense fine-tune of the same seed. FLOPs count predictors, and no",
        "padding; `padded ×` is over a dense run padded to the paper's lengths. `argmax` is the threshold 0.5 as",
        "trained, `sample` draws, `calibrated to` shifts all logits until held-out rows are read at that FLOPs",
        "speedup. A task's second table compares removal, at the threshold as trained, with the training forward",
        "without its noise; the largest difference is that of a logit, over the largest logit. Wall-clock is over our",
        "own dense run without padding, in turn in one process, on a GPU in bf16; skim efficiency divides it by the",
        "speedup of the FLOPs that both execute, in which the last layer is cut to the first token: somewhat less",
        "than `FLOPs ×`, the paper's count. A speedup that no shift leads to has no point for that seed, nor have (in",
        "these rows) the ones after it, so that some points are means over fewer seeds; wall-clock was not taken of",
        "every seed either.",
        "",
    ]
    for figure in plots.figures(rows):
        parts += [f"![{figure.title}](plots/{figure.path.name})", ""]
    found = results.configurations(rows)
    for (task, backbone, metric), group in results.panels(found).items():
        parts += [f"## {task}, {backbone}: {metric}", "", *lines(group), "", *forward_lines(group), _where(group), ""]
    return "\n".join([*parts, *trial_lines(trials)]).rstrip() + "\n"


def summary(rows: Sequence[results.Row]) -> str:
    """The README's table: `corrected` at the FLOPs speedup of `plots.WANTED`, wherever it was trained."""
    wanted = plots.WANTED
    table = head(("backbone", "task", "training", "dense", f"at FLOPs × {wanted:g}", "− dense", *_HEADS[-3:]))
    for found in sorted(results.configurations(rows), key=lambda one: (one.backbone, one.task)):
        if (found.mode, found.calibrated_to) == ("corrected", wanted):
            cells = [found.backbone, f"{found.task} ({found.metric})", found.training]
            cells += [percent(found.mean("dense")), percent(found.mean("value")), points(over_dense(found))]
            table.append(line([*cells, *_cells(found)[-3:]]))
    return "\n".join([*table, ""])


def trial_lines(trials: Sequence[dict[str, str]]) -> list[str]:
    """The section of what settings were chosen by, oldest first; nothing where there are no trials."""
    if not trials:
        return []
    names: dict[tuple[str, ...], str] = {}
    rows = []
    for row in trials:
        number = names.setdefault((row["task"], row["metric"], row["settings"], row["seed"]), str(len(names) + 1))
        decision = f"calibrated to {row['calibrated_to']}" if row["calibrated_to"] else row["decision"]
        value, dense = float(row["value"]), float(row["dense"])
        figures = [f"{100 * value:.2f}", f"{100 * (value - dense):+.2f}", f"{float(row['flops_speedup']):.2f}"]
        kept = " ".join(f"{share:.0%}" for share in json.loads(row["tokens_kept"]))
        rows.append([number, f"{row['task']} ({row['metric']})", decision, *figures, kept])
    listed = [
        f"{number}. {task}, seed {seed}: {', '.join(f'{name} {value}' for name, value in json.loads(settings).items())}"
        for (task, _, settings, seed), number in names.items()
    ]
    return [
        "## Trials",
        "",
        "What settings were chosen by: trainings in mode `corrected` from one dense fine-tune, with these settings",
        "instead of the mode's, judged on held-out training rows; the development rows were not read",
        "(`python -m benchmarks.accuracy.trials`, `benchmarks/results/accuracy-trials.csv`). One seed each: on some",
        "hundred rows, a difference of a point is noise.",
        "",
        *listed,
        "",
        *head(("trial", "task", "decision", "held out", "− dense", "FLOPs ×", "tokens kept by layer")),
        *(line(row) for row in rows),
    ]


def lines(group: Sequence[Configuration]) -> list[str]:
    """The table of one task, backbone and metric."""
    return [*head(_HEADS), *(line(_cells(configuration)) for configuration in group)]


def forward_lines(group: Sequence[Configuration]) -> list[str]:
    """Its table of training forward and removal, at the threshold as trained; none where that was not compared."""
    compared = [found for found in group if found.mean("forward_value") is not None]
    rows = [
        [
            found.training,
            _weight(found),
            percent(found.mean("value")),
            percent(found.mean("forward_value")),
            percent(found.mean("forward_agreement")),
            NOTHING if (apart := found.mean("forward_difference")) is None else f"{apart.value:.1e}",
            str(len(found.rows)),
        ]
        for found in compared
    ]
    return [*head(_FORWARD_HEADS), *(line(row) for row in rows), ""] if rows else []


def _cells(found: Configuration) -> list[str]:
    kept, efficiency = found.tokens_kept, times(found.mean("skim_efficiency"))
    return [
        found.training,
        _weight(found),
        found.point,
        percent(found.mean("value")),
        points(over_dense(found)),
        percent(found.mean("held_out_value")),
        times(found.mean("flops_speedup")),
        times(found.mean("flops_speedup_padded")),
        NOTHING if kept is None else f"{sum(kept) / len(kept):.1%}",
        times(found.mean("wall_clock_speedup")),
        efficiency if efficiency == NOTHING else f"**{efficiency}**",
        str(len(found.rows)),
    ]


def _weight(found: Configuration) -> str:
    return NOTHING if found.skim_weight is None else f"{found.skim_weight:g}"


def over_dense(found: Configuration) -> Mean | None:
    """value - dense, seed by seed; None for the dense fine-tune itself."""
    if found.mode == results.DENSE:
        return None
    return Mean.of(None if row["dense"] is None else row["value"] - row["dense"] for row in found.rows)


def percent(mean: Mean | None) -> str:
    if mean is None:
        return NOTHING
    return f"{100 * mean.value:.2f}" + ("" if mean.spread is None else f" ± {100 * mean.spread:.2f}")


def points(mean: Mean | None) -> str:
    if mean is None:
        return NOTHING
    return f"{100 * mean.value:+.2f}" + ("" if mean.spread is None else f" ± {100 * mean.spread:.2f}")


def times(mean: Mean | None) -> str:
    if mean is None:
        return NOTHING
    return f"{mean.value:.2f}" + ("" if mean.spread is None else f" ± {mean.spread:.2f}")


def _where(group: Sequence[Configuration]) -> str:
    rows = [row for configuration in group for row in configuration.rows]
    devices, commits = ({row[name] for row in rows if row[name]} for name in ("device", "commit"))
    plain = sum(row["bf16"] is False for row in rows)
    mixed = f" {plain} of the {len(rows)} rows are of training in fp32, the others in bf16."
    where, what = ", ".join(sorted(devices)) or "an unnamed device", ", ".join(sorted(commits)) or "unknown"
    return f"On {where}; commit {what}.{mixed if 0 < plain < len(rows) else ''}"
