"""`bench model`: one classifier run by every contender, on the same inputs, in one process."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..architectures import layer_count
from ..flops import EncoderShape
from ..skimming import skimming_of
from .contenders import KEEP_ALL, Contender
from .counters import count_launches
from .field import TOLERANCES, Checked, Field
from .peers import Peer, Subject
from .roofline import Ceilings, Work, encoder_work, measure_ceilings, total
from .setting import Setting
from .timing import Limits, paired_speedup, relative_spread, time_in_turn
from .workload import DTYPES, Batch

KIND = "model"


@dataclass(frozen=True)
class Counted:
    """What a contender executes for all batches: FLOPs and `roofline.Work`."""

    flops: int
    work: Work


@torch.no_grad()
def measure(
    setting: Setting, subject: Subject, batches: Sequence[Batch], field: Field, repeats: int, limits: Limits
) -> list[dict[str, Any]]:
    """A row per peer: figures, or the reason why there are none. Seconds are for all batches together.

    Keys of every row:
        kind, workload, contender, works_on: of the setting and of the peer.
        tokens, padded_tokens: of all batches.
        note: why there are no figures, else None.

    Keys of a row with figures, besides:
        seconds: by repeat; repeats, median_s, spread, tokens_per_s: of these.
        speedups: contender -> how many times faster than it.
        baseline: the fastest padding-free dense contender, None without one; with one, over it:
            wall_clock_speedup, executed_flops_speedup, and skim_efficiency, their quotient.
        flops_speedup, flops_speedup_padded: over dense without and with padding, every layer in full.
        flops, bytes: what it executes and moves; ceilings: of the device; bound_s: the least time that these allow;
            roofline_share: bound_s / median_s.
        kernels, launches, host_syncs: of a forward of the first batch; None without a device that tells.
        peak_memory: bytes, None where it is not known; build_s: seconds until it was ready.
        max_difference, tolerance: from the reference, see `field.TOLERANCES`.
    """
    entered = field.enter(setting, subject, batches)
    checked = {peer.name: found for peer, found in entered if isinstance(found, Checked)}
    dtype = DTYPES[setting.dtype]
    ceilings = measure_ceilings(setting.device, dtype)
    running = [Contender(name, found.built.run) for name, found in checked.items()]
    seconds = time_in_turn(running, batches, repeats, KEEP_ALL, limits, setting.device)
    ceilings = ceilings.highest(measure_ceilings(setting.device, dtype))
    counts = {name: count(found, setting, subject, batches) for name, found in checked.items()}
    free = [peer.name for peer, found in entered if peer.works_on == "real" and isinstance(found, Checked)]
    baseline = min(free, key=lambda name: statistics.median(seconds[name])) if free else None
    rows = []
    for peer, found in entered:
        row = _head(setting, subject, batches, peer)
        if isinstance(found, str):
            rows.append(row | {"note": found})
            continue
        row |= _times(peer.name, seconds, baseline, counts) | _cost(found, setting, batches[0])
        rows.append(row | _floor(counts[peer.name], row["median_s"], ceilings))
        rows[-1]["tokens_per_s"] = row["tokens"] / row["median_s"]
        for key, lengths in zip(("flops_speedup", "flops_speedup_padded"), _extents(batches), strict=True):
            rows[-1][key] = shape_of(subject).dense_flops(torch.cat(lengths)) / _paper_flops(found, subject, batches)
    return rows


def shape_of(subject: Subject) -> EncoderShape:
    return EncoderShape.of_model(subject.skimming)


def _extents(batches: Sequence[Batch]) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens of every sequence by batch: the real ones, and with the padding."""
    real = [batch.lengths for batch in batches]
    return real, [torch.full_like(batch.lengths, batch.inputs["input_ids"].size(1)) for batch in batches]


def _worked_on(found: Checked, subject: Subject, batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
    """By batch: tokens that arrive [sequences], and those that each layer works on [layers, sequences]."""
    real, padded = _extents(batches)
    lengths = padded if found.built.peer.works_on == "padded" else real
    layers = found.layer_lengths or [x.expand(layer_count(subject.dense.config), -1) for x in lengths]
    return list(zip(lengths, layers, strict=True))


def count(found: Checked, setting: Setting, subject: Subject, batches: Sequence[Batch]) -> Counted:
    """Executed FLOPs and work: ours leave out what the head does not read of the last layer."""
    peer, shape = found.built.peer, shape_of(subject).as_executed()
    itemsize = DTYPES[setting.dtype].itemsize
    options = {
        "first_token_only": peer.ours and skimming_of(subject.skimming).first_token_only,
        "predictors": peer.works_on == "kept",
    }
    pairs = _worked_on(found, subject, batches)
    flops = sum(shape.skimming_flops(lengths, layers, **options) for lengths, layers in pairs)
    work = total([encoder_work(shape, lengths, layers, itemsize, **options) for lengths, layers in pairs])
    return Counted(flops, work)


def _paper_flops(found: Checked, subject: Subject, batches: Sequence[Batch]) -> int:
    pairs = _worked_on(found, subject, batches)
    skims = found.built.peer.works_on == "kept"
    return sum(shape_of(subject).skimming_flops(lengths, layers, predictors=skims) for lengths, layers in pairs)


def _head(setting: Setting, subject: Subject, batches: Sequence[Batch], peer: Peer) -> dict[str, Any]:
    real, padded = (int(torch.cat(lengths).sum()) for lengths in _extents(batches))
    return {
        "kind": KIND,
        "workload": setting.to_dict(),
        "tokens": real,
        "padded_tokens": padded,
        "contender": peer.name,
        "works_on": peer.works_on,
        "note": None,
    }


def _times(
    name: str, seconds: dict[str, list[float]], baseline: str | None, counts: dict[str, Counted]
) -> dict[str, Any]:
    times = seconds[name]
    row: dict[str, Any] = {
        "seconds": times,
        "repeats": len(times),
        "median_s": statistics.median(times),
        "spread": relative_spread(times),
        "speedups": {other: paired_speedup(theirs, times) for other, theirs in seconds.items() if other != name},
        "baseline": baseline,
    }
    if baseline is not None:
        row["wall_clock_speedup"] = paired_speedup(seconds[baseline], times)
        row["executed_flops_speedup"] = counts[baseline].flops / counts[name].flops
        row["skim_efficiency"] = row["wall_clock_speedup"] / row["executed_flops_speedup"]
    return row


def _cost(found: Checked, setting: Setting, batch: Batch) -> dict[str, Any]:
    row: dict[str, Any] = {"kernels": None, "launches": None, "host_syncs": None}
    if setting.device == "cuda":
        launches = count_launches(lambda: found.built.run(batch.inputs))
        row = {"kernels": launches.kernels, "launches": launches.launches, "host_syncs": launches.host_syncs}
    return row | {
        "peak_memory": found.peak_memory,
        "max_difference": found.max_difference,
        "tolerance": TOLERANCES[setting.dtype],
        "build_s": found.built.build_s,
    }


def _floor(counted: Counted, median_s: float, ceilings: Ceilings) -> dict[str, Any]:
    bound = counted.work.bound_s(ceilings)
    return {
        "flops": counted.flops,
        "bytes": sum(counted.work.moved),
        "ceilings": {"bytes_per_s": ceilings.bytes_per_s, "flops_per_s": ceilings.flops_per_s},
        "bound_s": bound,
        "roofline_share": bound / median_s,
    }
