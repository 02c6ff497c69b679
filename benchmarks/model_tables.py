"""Markdown of the dated runs: the README's headline and docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from transkimmer.bench.contenders import KEEP_ALL as OURS
from transkimmer.bench.contenders import PADDED, SKIMMING

from . import plots
from .markdown import NOTHING, head, line
from .runs import Device, Row, Workload, short_name

HEADLINE_MODEL, PLOTTED = "bert-base-shape", "cpu-avx512-zen-5"
SMALL_BATCHES, LENGTHS = (1, 8), ("mrpc", "sst2", "rte", "squad2", "imdb")

# Folder of results -> instruction set of its CPU.
INSTRUCTION_SETS = {"cpu-avx2": "AVX2", "cpu-avx512": "AVX-512", "cpu-avx512-zen-5": "AVX-512 (Zen 5)"}

_HEADS = (
    *("model", "lengths", "decisions", "dtype", "batch", "FLOPs ×", "wall-clock ×", "**skim efficiency**", "spread"),
    *("× fastest of the others", "× padded HF", "roofline", "efficiency at the roofline", "difference"),
)
# Of a table for readers who meet it first; the README says what all decisions are.
_FEWER_HEADS = tuple(
    name for name in _HEADS if name not in ("decisions", "roofline", "efficiency at the roofline", "difference")
)


def headline(devices: Sequence[Device]) -> str:
    """BERT-base's rows at each device's largest batch, with fewer columns, and the plot of one device's speedups."""
    parts = []
    plotted = next((device for device in devices if device.name == PLOTTED), next(iter(devices), None))
    for device in devices:
        groups = [group for group in device.groups("model") if group[0]["model"] == HEADLINE_MODEL]
        if not groups:
            continue
        largest = max(workload["batch_size"] for workload, _ in groups)
        lines = efficiency_lines([group for group in groups if group[0]["batch_size"] == largest], _FEWER_HEADS)
        plot = _images(device, ("speedup",), "docs/") if device is plotted else []
        parts += [f"**{machine(device)}**", "", *plot, *lines, ""]
    if parts:
        more = "More workloads and columns, every peer, memory, training, and the commits"
        parts += [f"{more}: [docs/results.md](docs/results.md).", ""]
    return "\n".join(parts)


def small_batches(devices: Sequence[Device]) -> str:
    """BERT-base's skim efficiency at batch 1 and 8, a column for each length; the wall-clock speedup in brackets."""
    found: dict[tuple[str, str, int], dict[str, str]] = {}
    for device in devices:
        for workload, rows in device.groups("model"):
            skimming, size = rows.get(SKIMMING), workload["batch_size"]
            if workload["model"] != HEADLINE_MODEL or size not in SMALL_BATCHES or workload["lengths"] not in LENGTHS:
                continue
            if skimming is not None and skimming["note"] is None:
                cells = found.setdefault((processor(device), workload["dtype"], size), {})
                cells[workload["lengths"]] = f"{skimming['skim_efficiency']:.2f} ({skimming['wall_clock_speedup']:.2f})"
    lines = head(["skim efficiency (wall-clock ×)", "dtype", "batch", *LENGTHS])
    for (name, dtype, size), cells in sorted(found.items()):
        lines.append(line([name, dtype, str(size), *(cells.get(length, NOTHING) for length in LENGTHS)]))
    return "\n".join([*lines, ""])


def page(devices: Sequence[Device]) -> str:
    parts = [
        "# Results",
        "",
        "Generated from `benchmarks/results` by `make report`; `docs/benchmarks.md` says how. A figure is of the",
        "newest run that timed its contender on that workload.",
        "",
    ]
    for device in devices:
        parts += [f"## {device.name}", "", where(device), ""]
        models = device.groups("model")
        if models:
            parts += ["### Skimming against dense", "", *efficiency_lines(models), ""]
            parts += _images(device, ("speedup", "latency", "roofline"), "")
            parts += ["### Every contender, in tokens per second", "", *_matrix(models, _tokens), ""]
            parts += ["### Every contender, in MiB at its peak", "", *_matrix(models, _memory), ""]
            parts += [*_left_out(models), ""]
        if device.groups("training"):
            parts += ["### A training step", "", *training_lines(device), ""]
        if device.groups("profile"):
            parts += ["### By layer", "", *_images(device, ("layers",), "")]
    return "\n".join(parts).rstrip() + "\n"


def where(device: Device) -> str:
    return f"{machine(device)}; `transkimmer bench model`, commit {', '.join(device.environments)}."


def machine(device: Device) -> str:
    environment = list(device.environments.values())[-1]
    name = f"One {processor(device)}"
    if device.name.startswith("cpu"):
        name = f"{environment['processor']} with {processor(device)}, {environment['threads']} threads"
    return f"{name}, torch {environment['torch']}"


def processor(device: Device) -> str:
    """The instruction set of a CPU, the name of a GPU."""
    if device.name.startswith("cpu"):
        return INSTRUCTION_SETS.get(device.name, device.name)
    return device.name.replace("-", " ").upper()


def efficiency_lines(groups: Iterable[tuple[Workload, dict[str, Row]]], heads: Sequence[str] = _HEADS) -> list[str]:
    """A line per workload on which skimming was timed; heads: the columns, in the order of `_HEADS`."""
    lines = head(heads)
    for workload, rows in groups:
        skimming = rows.get(SKIMMING)
        if skimming is None or skimming["note"] is not None:
            continue
        others = {name: times for name, times in skimming["speedups"].items() if name != OURS}
        fastest = min(others, key=lambda name: others[name], default=None)
        cells = [
            *_names(workload),
            f"{skimming['executed_flops_speedup']:.2f}",
            f"{skimming['wall_clock_speedup']:.2f}",
            f"**{skimming['skim_efficiency']:.2f}**",
            _spread(skimming),
            NOTHING if fastest is None else f"{others[fastest]:.2f} ({short_name(fastest)})",
            f"{others[PADDED]:.2f}" if PADDED in others else NOTHING,
            f"{skimming['roofline_share']:.0%}",
            _attainable(skimming, rows.get(OURS)),
            f"{skimming['max_difference']:.0e}",
        ]
        lines.append(line(cell for name, cell in zip(_HEADS, cells, strict=True) if name in heads))
    return lines


def _attainable(skimming: Row, dense: Row | None) -> str:
    """The skim efficiency if both runs took what the roofline leaves: few tokens, and all weights to be read."""
    if dense is None or dense["note"] is not None:
        return NOTHING
    ours, theirs = (row["roofline_share"] * row["median_s"] for row in (skimming, dense))
    return f"{theirs / ours / skimming['executed_flops_speedup']:.2f}"


def training_lines(device: Device) -> list[str]:
    heads = ("model", "lengths", "dtype", "batch", "contender", "step", "spread", "speed", "tokens kept", "peak MiB")
    lines = head(heads)
    for workload, rows in device.groups("training"):
        first = next(iter(rows.values()))
        for name, row in rows.items():
            step = 1e3 * row["median_s"] / workload["batches"]
            speed = row["speedups"].get(first["contender"], 1.0)
            names = [workload["model"], workload["lengths"], workload["dtype"], str(workload["batch_size"]), name]
            kept = NOTHING if row.get("tokens_kept") is None else f"{row['tokens_kept']:.0%}"
            times = [f"{step:.0f} ms", _spread(row), f"{speed:.2f}"]
            lines.append(line([*names, *times, kept, _memory(row)]))
    return [
        *(*lines, ""),
        "Speed is over the first contender of the workload; a step is forward, backward and AdamW. Tokens kept: share "
        "that layers work on, as drawn; it matters where skimmed tokens are removed (pruned).",
    ]


def _names(workload: Workload) -> list[str]:
    decisions = "learned" if workload["schedule"] is None else f"synthetic, {workload['schedule']}"
    return [workload["model"], workload["lengths"], decisions, workload["dtype"], str(workload["batch_size"])]


def _spread(row: Row) -> str:
    """Of a single time it is not known; older rows have a 0 there."""
    return NOTHING if row["spread"] is None or row["repeats"] == 1 else f"{row['spread']:.0%}"


def _matrix(groups: Sequence[tuple[Workload, dict[str, Row]]], cell: Callable[[Row], str]) -> list[str]:
    """A line per workload, a column per contender that was timed anywhere; `*`: timed once only, for being slow."""
    timed = [name for _, rows in groups for name, row in rows.items() if row["note"] is None]
    names = list(dict.fromkeys(timed))
    lines = head(["model", "lengths", "dtype", "batch", *map(short_name, names)])
    for workload, rows in groups:
        cells = [workload["model"], workload["lengths"], workload["dtype"], str(workload["batch_size"])]
        for name in names:
            row = rows.get(name)
            cells.append(NOTHING if row is None or row["note"] is not None else cell(row))
        lines.append(line(cells))
    return lines


def _tokens(row: Row) -> str:
    return f"{row['tokens_per_s']:,.0f}{'*' if row['repeats'] == 1 else ''}"


def _memory(row: Row) -> str:
    return NOTHING if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:,.0f}"


def _left_out(groups: Iterable[tuple[Workload, dict[str, Row]]]) -> list[str]:
    """Why contenders have no figures, each reason once."""
    notes = {f"- {name}: {row['note']}" for _, rows in groups for name, row in rows.items() if row["note"] is not None}
    return [
        "`*`: slow, timed once.",
        *([f"`{NOTHING}`: not timed, for one of these reasons:", "", *sorted(notes)] if notes else []),
    ]


def _images(device: Device, names: Iterable[str], folder: str) -> list[str]:
    drawn = {figure.name: figure for figure in plots.figures([device])}
    found = [drawn[name] for name in names if name in drawn]
    return [text for figure in found for text in (f"![{figure.title}]({folder}plots/{figure.path.name})", "")]
