"""`transkimmer profile`: where the time of a forward goes, by operator, by layer, and on a GPU between its kernels."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from ..arguments import check_least, check_outputs
from ..records import record_skimming
from ..skimming import skimming_of
from .model_command import NOTHING, add_outputs, console_of
from .peers import PEERS, Peer, Run, Subject
from .results import Store
from .setting import Setting, prepare, settings
from .setting import add_arguments as add_setting
from .timing import synchronize
from .workload import Batch

KIND = "profile"
_LAYER = "transkimmer::encoder_layer_"
_OURS = "transkimmer::"
_CAPTURED_AFTER = 3  # forwards of a size: one runs eagerly, the next is captured


@dataclass(frozen=True)
class OperatorTime:
    """Per pass over all batches. self_s: host time without that of the operators it calls; device_s: of its kernels."""

    name: str
    calls: float
    self_s: float
    device_s: float


@dataclass(frozen=True)
class LayerTime:
    """Per pass over all batches. tokens: worked on; decision_s: predictor and compaction before the layer; layer_s."""

    layer: int
    tokens: int
    decision_s: float
    layer_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_setting(parser, many=False)
    keys = [peer.key for peer in PEERS]
    parser.add_argument("--contender", choices=keys, default="skimming", help="contender to profile")
    parser.add_argument("--repeats", type=int, default=3, help="passes over all batches")
    parser.add_argument("--top", type=int, default=15, help="operators to show")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a Chrome trace (chrome://tracing, Perfetto)")
    add_outputs(parser)


def run(arguments: argparse.Namespace) -> int:
    check_least(arguments, repeats=1, top=1)
    check_outputs(arguments, ("json", "trace"))
    setting, subject, batches = prepare(next(settings(arguments)), arguments.kernels)
    peer = next(peer for peer in PEERS if peer.key == arguments.contender)
    if (reason := peer.why_not(setting.device, setting.dtype)) is not None:
        raise ValueError(f"--contender {peer.key}: {reason}")
    row = measure(setting, subject, batches, peer, arguments.repeats, arguments.trace)
    console = console_of()
    title = f"{peer.name}: {setting}; per pass over all batches"
    console.print(operator_table(row, title, arguments.top))
    if row["layers"]:
        console.print(layer_table(row))
    if row["gap_share"] is not None:
        console.print(f"launch gaps: the device stood idle for {row['gap_share']:.0%} of the time between its kernels")
    store = Store(setting.device, file=arguments.json, folder=arguments.results)
    store.add([row])
    for path in [*store.paths, *([arguments.trace] if arguments.trace else [])]:
        console.print(f"wrote {path}")
    return 0


@torch.no_grad()
def measure(
    setting: Setting, subject: Subject, batches: Sequence[Batch], peer: Peer, repeats: int, trace: Path | None = None
) -> dict[str, Any]:
    """A row with keys kind, workload, contender, repeats, operators (by falling time), layers (of our runtime, else
    empty) and gap_share (None on a CPU). The profiler itself slows small operators down: shares mean more than seconds.

    On a GPU our runtime is profiled operator by operator, without its graphs; the gaps are those between the kernels of
    the replays that it is made of otherwise.
    """
    on_device = setting.device == "cuda"
    graphed = on_device and peer.ours
    if graphed:
        skimming_of(subject.skimming).cuda_graphs = "off"
    call = peer.build(subject, batches[0].inputs, setting.dtype)
    counts = []
    for batch in batches:  # compiles and prepares weights, and says how many tokens each layer works on
        with record_skimming() as records:
            call(batch.inputs)
        counts += [record.layer_lengths.sum(1) for record in records]
    profiler = _profiled(call, batches, repeats, setting.device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    events = profiler.events()
    tokens = torch.stack(counts).sum(0).tolist() if counts else []
    whole = events
    if graphed:
        skimming_of(subject.skimming).cuda_graphs = "auto"
        replayed = peer.build(subject, batches[0].inputs, setting.dtype)
        for batch in batches:
            for _ in range(_CAPTURED_AFTER):
                replayed(batch.inputs)
        whole = _profiled(replayed, batches, repeats, setting.device).events()
    device = [event.time_range for event in whole if event.device_type.name == "CUDA"]
    gaps = gap_share((times.start, times.end) for times in device)
    return {
        "kind": KIND,
        "workload": setting.to_dict(),
        "contender": peer.name,
        "repeats": repeats,
        "operators": [asdict(operator) for operator in operator_times(profiler.key_averages(), repeats)],
        "layers": [asdict(layer) for layer in layer_times(events, tokens, repeats, on_device=on_device)],
        "gap_share": gaps,
    }


def _profiled(call: Run, batches: Sequence[Batch], repeats: int, device: str) -> profile:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    synchronize(device)
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            for batch in batches:
                call(batch.inputs)
        synchronize(device)
    return profiler


def operator_times(averages: Iterable[Any], passes: int) -> list[OperatorTime]:
    found = [
        OperatorTime(
            name=average.key,
            calls=average.count / passes,
            self_s=1e-6 * average.self_cpu_time_total / passes,
            device_s=1e-6 * average.self_device_time_total / passes,
        )
        for average in averages
    ]
    return sorted(found, key=lambda operator: -max(operator.self_s, operator.device_s))


def layer_times(events: Iterable[Any], tokens: Sequence[int], passes: int, *, on_device: bool) -> list[LayerTime]:
    """Of our runtime: its layers come in order, and what it calls between two of them decides on the later one.

    Args:
        events: of the profiler. tokens: by layer, for one pass. on_device: whether the device's time counts.
    """
    if not tokens:
        return []
    times = [[0.0, 0.0] for _ in tokens]
    layer = 0
    top = (e for e in events if e.name.startswith(_OURS) and not _within_ours(e))
    for event in sorted(top, key=lambda e: e.time_range.start):
        seconds = 1e-6 * (event.device_time_total if on_device else event.time_range.elapsed_us())
        is_layer = event.name.startswith(_LAYER)
        times[layer][is_layer] += seconds
        layer = (layer + is_layer) % len(tokens)
    if not any(layer_s for _, layer_s in times):
        return []  # replayed as a whole, or of single operators: no call is a layer
    return [
        LayerTime(number, tokens[number], decision / passes, layer_s / passes)
        for number, (decision, layer_s) in enumerate(times)
    ]


def _within_ours(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(_OURS):
            return True
        parent = parent.cpu_parent
    return False


def gap_share(intervals: Iterable[tuple[float, float]]) -> float | None:
    """Share of the time from the first start to the last end that no interval covers; None without intervals."""
    ordered = sorted(intervals)
    if not ordered:
        return None
    begin, end, idle = ordered[0][0], ordered[0][1], 0.0
    for start, stop in ordered:
        idle += max(0.0, start - end)
        end = max(end, stop)
    return idle / (end - begin) if end > begin else 0.0


def operator_table(row: dict[str, Any], title: str, top: int) -> Table:
    on_device = row["workload"]["device"] == "cuda"
    table = Table(title=title, title_justify="left")
    table.add_column("operator", no_wrap=True)
    for heading in ("calls", "host", "share", "device", "share"):
        table.add_column(heading, justify="right")
    totals = {key: sum(operator[key] for operator in row["operators"]) for key in ("self_s", "device_s")}
    for operator in row["operators"][:top]:
        cells = [_milliseconds(operator["self_s"]), _share(operator["self_s"], totals["self_s"])]
        cells += [_milliseconds(operator["device_s"]), _share(operator["device_s"], totals["device_s"])]
        table.add_row(
            operator["name"], f"{operator['calls']:g}", *(cells if on_device else [*cells[:2], NOTHING, NOTHING])
        )
    return table


def layer_table(row: dict[str, Any]) -> Table:
    table = Table(title="by layer", title_justify="left")
    for heading in ("layer", "tokens", "kept", "decision", "layer", "of the first layer's time"):
        table.add_column(heading, justify="right")
    first = row["layers"][0]
    for layer in row["layers"]:
        table.add_row(
            str(layer["layer"]),
            f"{layer['tokens']:,}",
            _share(layer["tokens"], first["tokens"]),
            _milliseconds(layer["decision_s"]),
            _milliseconds(layer["layer_s"]),
            _share(layer["layer_s"], first["layer_s"]),
        )
    return table


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else NOTHING
