"""Plots of the dated runs as SVG under docs/plots. What a plot shows is data here; drawing it needs matplotlib."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transkimmer.bench.contenders import SKIMMING

from .runs import Device, Row, Workload, short_name

FOLDER = Path("docs/plots")
_COLOURS = {"fp32": "#3182bd", "bf16": "#e6550d"}
_MARKERS = "osD^v<>P"
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "transkimmer",  # else every drawing has other identifiers
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Figure:
    """name: of the plot; title: alternative text; data: all that it shows, as JSON; paint: draws that on axes.

    device: what was measured on, or "accuracy". With `panels`, the data are a list, an item for each of them.
    """

    name: str
    device: str
    title: str
    data: Any
    paint: Callable[[Any, Any], None]
    panels: int | None = None

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.device}-{self.name}.svg"

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()

    def is_current(self, root: Path) -> bool:
        path = root / self.path
        return path.is_file() and self.digest in path.read_text(encoding="utf-8")

    def draw(self, root: Path) -> None:
        """Writes the SVG, the same bytes for the same data (and the same matplotlib)."""
        import matplotlib
        from matplotlib.figure import Figure as Canvas

        (root / FOLDER).mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(_SETTINGS):
            columns = min(self.panels or 1, 3)
            rows = -(-(self.panels or 1) // columns)
            size = (6.0, 3.6) if self.panels is None else (max(6.0, 4.0 * columns), 3.2 * rows)
            canvas = Canvas(figsize=size, layout="constrained")
            places = list(canvas.subplots(rows, columns, squeeze=False).flat)
            shown = [self.data] if self.panels is None else self.data
            for axes, data in zip(places, shown, strict=False):
                self.paint(axes, data)
            for axes in places[len(shown) :]:
                axes.remove()
            metadata = {"Description": f"data sha256 {self.digest}", "Title": self.title, "Date": None, "Creator": None}
            canvas.savefig(root / self.path, format="svg", metadata=metadata)


def figures(devices: Iterable[Device]) -> list[Figure]:
    """Every plot that the stored rows suffice for."""
    found = []
    for device in devices:
        for name, title, data, paint in (
            ("speedup", "Wall-clock speedup against FLOPs speedup", speedups(device), paint_speedups),
            ("latency", "Latency against batch size", latencies(device), paint_latencies),
            ("roofline", "Rate against arithmetic intensity", rooflines(device), paint_rooflines),
            ("layers", "Time per layer as tokens vanish", layers(device), paint_layers),
        ):
            if data:
                found.append(Figure(name, device.name, title, data, paint))
    return found


def _timed(rows: dict[str, Row], name: str) -> Row | None:
    row = rows.get(name)
    return None if row is None or row["note"] is not None else row


def _label(workload: Workload) -> str:
    return f"{workload['model'].removesuffix('-shape')}, {workload['lengths']}, {workload['dtype']}"


def speedups(device: Device) -> list[dict[str, Any]]:
    """A point per workload: skimming over the fastest padding-free dense run."""
    return [
        {
            "flops": row["executed_flops_speedup"],
            "time": row["wall_clock_speedup"],
            "dtype": workload["dtype"],
            "batch_size": workload["batch_size"],
        }
        for workload, rows in device.groups("model")
        if (row := _timed(rows, SKIMMING)) is not None
    ]


def paint_speedups(axes: Any, points: Sequence[dict[str, Any]]) -> None:
    largest = 1.05 * max(max(point["flops"], point["time"]) for point in points)
    axes.plot([1, largest], [1, largest], color="#999999", linewidth=1, zorder=1)
    axes.set_title("on the line, all that is left out is time saved", fontsize=9)
    sizes = sorted({point["batch_size"] for point in points})
    for dtype in sorted({point["dtype"] for point in points}, reverse=True):
        for marker, size in zip(_MARKERS, sizes, strict=False):
            chosen = [point for point in points if (point["dtype"], point["batch_size"]) == (dtype, size)]
            if chosen:
                x, y = ([point[key] for point in chosen] for key in ("flops", "time"))
                axes.scatter(x, y, s=28, marker=marker, color=_COLOURS[dtype], label=f"{dtype}, batch {size}", zorder=2)
    axes.set(xlabel="FLOPs speedup", ylabel="wall-clock speedup")
    axes.legend(loc="upper left", fontsize=8)


def latencies(device: Device) -> dict[str, Any]:
    """Of the workload with the most batch sizes: contender -> [batch size, milliseconds of a batch]."""
    sweeps: dict[str, dict[str, list[list[float]]]] = {}
    for workload, rows in device.groups("model"):
        lines = sweeps.setdefault(_label(workload), {})
        for name, row in rows.items():
            if row["note"] is None:
                point = [workload["batch_size"], 1e3 * row["median_s"] / workload["batches"]]
                lines.setdefault(name, []).append(point)
    lengths = {label: max(map(len, lines.values()), default=0) for label, lines in sweeps.items()}
    best = max(lengths, key=lambda label: lengths[label], default=None)
    return {} if best is None or lengths[best] < 2 else {"label": best, "lines": sweeps[best]}


def paint_latencies(axes: Any, data: dict[str, Any]) -> None:
    for marker, (name, points) in zip(_MARKERS * 2, data["lines"].items(), strict=False):
        style = {"linewidth": 2.2, "color": "#31a354"} if name == SKIMMING else {"linewidth": 1}
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, label=short_name(name), **style)
    sizes = sorted({size for points in data["lines"].values() for size, _ in points})
    axes.set(xscale="log", yscale="log", xlabel="sequences in a batch", ylabel="ms per batch", title=data["label"])
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    _legend_beside(axes)


def _legend_beside(axes: Any) -> None:
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def rooflines(device: Device) -> dict[str, Any]:
    """In the first dtype that was timed: contender -> [FLOPs per byte, FLOP/s], and the highest measured ceilings."""
    groups = device.groups("model")
    groups = [group for group in groups if group[0]["dtype"] == groups[0][0]["dtype"]]
    lines: dict[str, list[list[float]]] = {}
    ceilings = []
    for _, rows in groups:
        for name in rows:
            if (row := _timed(rows, name)) is not None:
                lines.setdefault(name, []).append([row["flops"] / row["bytes"], row["flops"] / row["median_s"]])
                ceilings.append(row["ceilings"])
    if not lines:
        return {}
    highest = {key: max(ceiling[key] for ceiling in ceilings) for key in ("bytes_per_s", "flops_per_s")}
    return {"dtype": groups[0][0]["dtype"], "lines": lines, "ceilings": highest}


def paint_rooflines(axes: Any, data: dict[str, Any]) -> None:
    rate, peak = data["ceilings"]["bytes_per_s"], data["ceilings"]["flops_per_s"]
    intensities = [x for points in data["lines"].values() for x, _ in points]
    left, right = min(*intensities, peak / rate) / 2, 2 * max(*intensities, peak / rate)
    axes.plot([left, peak / rate, right], [left * rate, peak, peak], color="#999999", linewidth=1)
    for marker, (name, points) in zip(_MARKERS * 2, data["lines"].items(), strict=False):
        axes.scatter(*zip(*points, strict=True), s=18, marker=marker, label=short_name(name))
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must move", ylabel="FLOP/s", title=data["dtype"])
    _legend_beside(axes)


def layers(device: Device) -> dict[str, Any]:
    """Of the first profile of our runtime that skims: tokens, and milliseconds of decision and layer, by layer."""
    for workload, rows in device.groups("profile"):
        row = rows.get(SKIMMING)
        if row is not None and row["layers"]:
            found = {key: [layer[key] for layer in row["layers"]] for key in ("tokens", "decision_s", "layer_s")}
            return found | {"label": f"{_label(workload)}, batch {workload['batch_size']}"}
    return {}


def paint_layers(axes: Any, data: dict[str, Any]) -> None:
    number = list(range(len(data["tokens"])))
    decision, layer = ([1e3 * s for s in data[key]] for key in ("decision_s", "layer_s"))
    axes.bar(number, layer, color="#6baed6", label="layer")
    axes.bar(number, decision, bottom=layer, color="#e6a000", label="decision")
    scale = layer[0] / data["tokens"][0]
    axes.plot(number, [scale * tokens for tokens in data["tokens"]], "k.-", linewidth=1, label="tokens (of the first)")
    axes.set(xlabel="layer", ylabel="ms", title=data["label"])
    axes.legend(fontsize=8)
