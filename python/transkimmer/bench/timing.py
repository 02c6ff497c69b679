"""Timing contenders side by side: each runs all batches, in turn, so that a slow spell of the machine hits them all."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from transkimmer_kernels.runtime import GraphCache

from ..flops import EncoderShape
from ..records import record_skimming
from ..skimming import skimming_of
from .contenders import KEEP_ALL, PADDED, PLAIN, SKIMMING, Contender, contenders
from .workload import Batch

# A contender this many times slower than our dense run is timed once: it decides nothing, and would take all the time.
HOPELESS = 5.0
# Untimed rounds on a GPU: kernels compile, and the second and third forward of a size capture and record graphs.
_WARM_UP = 3


@dataclass(frozen=True)
class Limits:
    """When a contender is timed no further; each gets one round.

    slow: after one that took so many times as long as the measure's; budget_s: when all of them together took so long.
    """

    slow: float = HOPELESS
    budget_s: float = math.inf


_LIMITS = Limits()


@dataclass
class Row:
    """One contender's figures. Speedups are over the baseline: the faster of the two padding-free dense contenders.

    Attributes:
        name: of the contender.
        accuracy: None without labels.
        tokens_kept: share of token-layers worked on, padding counting above 1.
        flops_speedup: FLOPs that the baseline executes over FLOPs that this contender does. Ours leave out what the
            head does not read of the last layer, dense or skimming.
        paper_flops_speedup: the same with every layer in full, as the paper counts.
        wall_clock_speedup: median over repeats of the paired ratio.
        skim_efficiency: wall_clock_speedup / flops_speedup.
        agreement: share of predictions equal to the dense model's.
        median_s: seconds for all batches.
        spread: (max - min) / median over the repeats; None where there is one.
        repeats: 1 for a contender more than HOPELESS times slower than our dense run.
    """

    name: str
    accuracy: float | None
    tokens_kept: float
    flops_speedup: float
    paper_flops_speedup: float
    wall_clock_speedup: float
    skim_efficiency: float
    agreement: float
    median_s: float
    spread: float | None
    repeats: int

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@torch.no_grad()
def compare(model: PreTrainedModel, batches: Sequence[Batch], repeats: int, limits: Limits = _LIMITS) -> list[Row]:
    """Times the four ways of running `model` (with skimming) on `batches`."""
    if repeats < 1:
        raise ValueError(f"--repeats {repeats}: must be at least 1")
    field = contenders(model)
    answers: dict[str, list[Tensor]] = {contender.name: [] for contender in field}
    layer_lengths = []
    # Untimed: answers, counts and warm-up.
    for batch in tqdm(batches, desc="answers", unit="batch", leave=False, disable=None):
        for contender in field:
            with record_skimming() as records:
                answers[contender.name].append(contender.run(batch.inputs).argmax(-1))
            if contender.name == SKIMMING:
                layer_lengths.append(records[0].layer_lengths)
    seconds = time_in_turn(field, batches, repeats, KEEP_ALL, limits)
    skimming_of(model).enabled = True
    return _rows(model, batches, seconds, answers, torch.cat(layer_lengths, 1))


def time_in_turn(
    field: Sequence[Contender],
    batches: Sequence[Batch],
    repeats: int,
    measure: str,
    limits: Limits = _LIMITS,
    device: str = "cpu",
) -> dict[str, list[float]]:
    """name -> seconds for all batches, by repeat. Contenders take turns at running them all, and at starting a round.

    After another contender's turn the first forward finds its weights and its code in no cache. One that follows a
    forward of the same model, as on a server, does: hence all batches in a row.

    Those that are too slow, compared with the one called `measure` or with their budget, drop out. A call is over when
    `device` has finished; on a GPU each has run every batch three times before the first that is timed, and keeps the
    graphs of all of them until the last.

    Warns:
        UserWarning: graphs were captured in timed calls all the same, which are then too slow.
    """
    with _graphs_for(field, batches):
        for batch in batches if device == "cuda" else ():
            for contender in [*field] * _WARM_UP:
                contender.run(batch.inputs)
        caches = _caches(field)
        captured = sum(cache.captures for cache in caches)
        seconds = _take_turns(field, batches, repeats, measure, limits, device)
        if more := sum(cache.captures for cache in caches) - captured:
            warnings.warn(f"{more} CUDA graphs were captured in timed calls: max_bytes is too small", stacklevel=2)
    return seconds


def _caches(field: Sequence[Contender]) -> list[GraphCache]:
    """Each once; contenders may have one in common."""
    return list({id(c.graphs): c.graphs for c in field if c.graphs is not None}.values())


@contextlib.contextmanager
def _graphs_for(field: Sequence[Contender], batches: Sequence[Batch]) -> Iterator[None]:
    """Room for a graph of every contender and batch: one that made another go would be captured at every round."""
    before = [(cache, cache.max_graphs) for cache in _caches(field)]
    for cache, count in before:
        cache.max_graphs = max(count, len(cache) + len(field) * len(batches))
    try:
        yield
    finally:
        for cache, count in before:
            cache.max_graphs = count


def _take_turns(
    field: Sequence[Contender], batches: Sequence[Batch], repeats: int, measure: str, limits: Limits, device: str
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {contender.name: [] for contender in field}
    runs = repeats * len(batches) * len(field)
    with tqdm(total=runs, desc="timing", unit="batch", leave=False, disable=None) as progress:
        for repeat in range(repeats):
            turn = repeat % len(field)
            for contender in [*field[turn:], *field[:turn]]:
                total = 0.0
                for batch in batches:
                    synchronize(device)
                    start = time.perf_counter()
                    contender.run(batch.inputs)
                    synchronize(device)
                    total += time.perf_counter() - start
                    progress.update()
                seconds[contender.name].append(total)
            slowest = limits.slow * seconds[measure][0]
            field = [c for c in field if seconds[c.name][0] <= slowest and sum(seconds[c.name]) < limits.budget_s]
            progress.total = progress.n + len(batches) * (repeats - 1 - repeat) * len(field)
            if not field:
                break
    return seconds


def synchronize(device: str) -> None:
    """Waits until `device` ("cpu" or "cuda") has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def paired_speedup(baseline: Sequence[float], times: Sequence[float]) -> float:
    """How many times faster than `baseline`: median over the repeats that both have, each compared with its own."""
    return statistics.median(b / t for b, t in zip(baseline, times, strict=False))


def relative_spread(times: Sequence[float]) -> float | None:
    """(max - min) / median; None of a single time, which lies apart from nothing."""
    if len(times) < 2:
        return None
    return (max(times) - min(times)) / statistics.median(times)


def _rows(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    seconds: dict[str, list[float]],
    answers: dict[str, list[Tensor]],
    layer_lengths: Tensor,
) -> list[Row]:
    lengths = torch.cat([batch.lengths for batch in batches])
    padded = torch.cat([torch.full_like(batch.lengths, batch.inputs["input_ids"].size(1)) for batch in batches])
    labels = None if batches[0].labels is None else torch.cat([b.labels for b in batches if b.labels is not None])
    shape = EncoderShape.of_model(model)
    paper = {
        PADDED: shape.dense_flops(padded),
        PLAIN: shape.dense_flops(lengths),
        KEEP_ALL: shape.dense_flops(lengths),
        SKIMMING: shape.skimming_flops(lengths, layer_lengths),
    }
    cut = skimming_of(model).first_token_only
    executed = paper | {
        KEEP_ALL: shape.dense_flops(lengths, first_token_only=cut),
        SKIMMING: shape.as_executed().skimming_flops(lengths, layer_lengths, first_token_only=cut),
    }
    total = float(lengths.sum())
    kept = {
        PADDED: float(padded.sum()) / total,
        PLAIN: 1.0,
        KEEP_ALL: 1.0,
        SKIMMING: float(layer_lengths.sum()) / total / shape.layers,
    }
    baseline = min((PLAIN, KEEP_ALL), key=lambda name: statistics.median(seconds[name]))
    reference = torch.cat(answers[KEEP_ALL])
    rows = []
    for name, times in seconds.items():
        predictions = torch.cat(answers[name])
        speedup = paired_speedup(seconds[baseline], times)
        flops_speedup = executed[baseline] / executed[name]
        rows.append(
            Row(
                name=name,
                accuracy=None if labels is None else float((predictions == labels).double().mean()),
                tokens_kept=kept[name],
                flops_speedup=flops_speedup,
                paper_flops_speedup=paper[baseline] / paper[name],
                wall_clock_speedup=speedup,
                skim_efficiency=speedup / flops_speedup,
                agreement=float((predictions == reference).double().mean()),
                median_s=statistics.median(times),
                spread=relative_spread(times),
                repeats=len(times),
            )
        )
    return rows
