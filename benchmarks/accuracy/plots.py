"""Plots of `accuracy.csv`: accuracy against FLOPs speedup (the paper's Fig. 3), tokens kept by layer (its Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..plots import Figure
from . import results
from .results import DENSE, Configuration

WANTED = 2.0  # FLOPs speedup at which tasks are compared layer by layer
_COLOURS = ("#3182bd", "#e6550d", "#31a354", "#756bb1", "#c51b8a", "#8c6d31", "#636363", "#17becf")
_MODES = {"corrected": _COLOURS[0], "published": _COLOURS[1], "paper": _COLOURS[2]}  # the same in every panel
_MARKERS = {"threshold": "o", "argmax": "s", "sample": "^"}


def figures(rows: Sequence[results.Row]) -> list[Figure]:
    """What the rows suffice for."""
    found = results.configurations(rows)
    drawn = []
    for name, title, data, paint in (
        ("trade-off", "Accuracy against FLOPs speedup", trade_offs(found), paint_trade_off),
        ("layers", "Tokens kept by layer", layers(found), paint_layers),
    ):
        if data:
            drawn.append(Figure(name, "accuracy", title, data, paint, panels=len(data)))
    return drawn


def trade_offs(found: Sequence[Configuration]) -> list[dict[str, Any]]:
    """A panel per task, backbone and metric: the dense fine-tune, and a point per configuration that skims."""
    panels = []
    for (task, backbone, metric), group in results.panels(found).items():
        points = [
            {
                "training": configuration.training,
                "skim_weight": configuration.skim_weight,
                "decision": configuration.decision,
                "speedup": _mean(configuration, "flops_speedup"),
                "value": _mean(configuration, "value"),
            }
            for configuration in group
            if configuration.mode != DENSE
        ]
        if points:
            dense = results.dense(group)
            title = f"{task}, {backbone}"
            panels.append(
                {"title": title, "metric": metric, "dense": None if dense is None else dense.data(), "points": points}
            )
    return panels


def _mean(configuration: Configuration, column: str) -> list[float | None]:
    found = configuration.mean(column)
    assert found is not None  # the column is never empty
    return found.data()


def paint_trade_off(axes: Any, panel: dict[str, Any]) -> None:
    if panel["dense"] is not None:
        value, spread = panel["dense"]
        axes.axhspan(value - (spread or 0), value + (spread or 0), color="#cccccc", linewidth=0, zorder=0)
        axes.axhline(value, color="#777777", linewidth=1, label="dense fine-tune", zorder=1)
    trainings = sorted({point["training"] for point in panel["points"]})
    others = [training for training in trainings if training not in _MODES]
    colours = _MODES | dict(zip(others, _COLOURS[len(_MODES) :] * len(others), strict=False))
    for training in trainings:
        colour = colours[training]
        mine = [point for point in panel["points"] if point["training"] == training]
        for weight in sorted({point["skim_weight"] or 0 for point in mine}):
            # Points of one trained model, at different thresholds, are a curve.
            line = sorted(_at(p) for p in mine if (p["skim_weight"] or 0) == weight and p["decision"] != "sample")
            axes.plot(*zip(*line, strict=True) if line else ([], []), color=colour, linewidth=0.8, alpha=0.6, zorder=2)
        for decision in sorted({point["decision"] or "" for point in mine}):
            chosen = [point for point in mine if (point["decision"] or "") == decision]
            axes.errorbar(
                *zip(*map(_at, chosen), strict=True),
                xerr=[point["speedup"][1] or 0 for point in chosen],
                yerr=[point["value"][1] or 0 for point in chosen],
                fmt=_MARKERS.get(decision, "D"),
                markersize=4,
                linewidth=0.8,
                color=colour,
                label=f"{training}, {decision or 'as trained'}",
                zorder=3,
            )
    axes.set(xlabel="FLOPs speedup, no padding", ylabel=panel["metric"])
    axes.set_title(panel["title"], fontsize=9)
    axes.legend(fontsize=6)


def _at(point: dict[str, Any]) -> tuple[float, float]:
    return point["speedup"][0], point["value"][0]


def layers(found: Sequence[Configuration]) -> list[dict[str, Any]]:
    """A panel per backbone and training: of each task the point whose FLOPs speedup is nearest to `WANTED`."""
    groups: dict[str, list[Configuration]] = {}
    for configuration in found:
        if configuration.mode != DENSE and configuration.tokens_kept is not None:
            groups.setdefault(f"{configuration.backbone}, {configuration.training}", []).append(configuration)
    panels = []
    for title, group in groups.items():
        lines = {}
        for task in sorted({configuration.task for configuration in group}):
            mine = [configuration for configuration in group if configuration.task == task]
            nearest = min(mine, key=lambda one: abs(_speedup(one) - WANTED))
            lines[task] = {"speedup": _speedup(nearest), "point": nearest.point, "tokens_kept": nearest.tokens_kept}
        panels.append({"title": title, "lines": lines})
    return panels


def _speedup(configuration: Configuration) -> float:
    value = _mean(configuration, "flops_speedup")[0]
    assert value is not None
    return value


def paint_layers(axes: Any, panel: dict[str, Any]) -> None:
    lines = panel["lines"]
    for colour, (task, line) in zip(_COLOURS * len(lines), lines.items(), strict=False):
        label = f"{task}: ×{line['speedup']:.2f}, {line['point']}"
        axes.plot(range(len(line["tokens_kept"])), line["tokens_kept"], ".-", color=colour, linewidth=1.2, label=label)
    axes.set(xlabel="layer", ylabel="share of the tokens kept", ylim=(0, 1.05))
    axes.set_title(panel["title"], fontsize=9)
    axes.legend(fontsize=6)
