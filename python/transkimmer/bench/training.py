"""`bench training`: a training step of dense fine-tuning, of skimming by masks as published, and of ours.

Every contender has its own copy of the weights and takes whole steps: forward, backward, AdamW. Dropout is the model's,
but none falls on attention probabilities, where ours has none. Those that skim draw their decisions, by predictors that
keep the schedule's shares on average; it matters to pruned training only, in which skimmed tokens leave the batch.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..architectures import architecture_of, encoder_of
from ..graphed_training import GraphedTraining
from ..predictor import KEEP, SKIM, SkimPredictor
from ..records import SkimRecord, current_records, record_skimming
from ..skimming import skimming_of
from .contenders import PADDED, Contender
from .counters import PeakMemory
from .field import TOLERANCES
from .masked import PublishedTraining
from .peers import Subject
from .scheduled_draws import draw_by_schedule
from .setting import Setting
from .timing import Limits, paired_speedup, relative_spread, time_in_turn
from .workload import DTYPES, Batch

KIND = "training"
DENSE = PADDED
DENSE_PACKED = "dense, packed (ours)"
PUBLISHED = "skimming by masks, padded (as published)"
PACKED = "skimming, packed (ours)"
PRUNED = "skimming, packed, pruned (ours)"
DENSE_GRAPHED = "dense, packed, graphs (ours)"
GRAPHED = "skimming, packed, graphs (ours)"
_LEARNING_RATE = 1e-6  # so little that predictors go on keeping about what they were set to keep
_KEEP_ALL_LOGIT = 50.0  # far enough that no draw skims

Loss = Callable[[dict[str, Tensor], Tensor], Tensor]


@dataclass
class Learner:
    """Trains. model: what has the parameters; loss: (inputs, labels [batch]) -> scalar, differentiable."""

    name: str
    model: nn.Module
    loss: Loss

    def __post_init__(self) -> None:
        self.model.train()
        # One kernel for all parameters, as Hugging Face's `Trainer` has it by default.
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=_LEARNING_RATE, fused=True)

    def step(self, inputs: dict[str, Tensor]) -> Tensor:
        loss = self.loss(inputs, labels_of(inputs))
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @property
    def graphs(self) -> GraphedTraining | None:
        skimming = getattr(self.model, "skimming", None)
        return None if skimming is None else skimming.training_graphs


def _dense(subject: Subject, dtype: torch.dtype) -> tuple[nn.Module, Loss]:
    model: Any = copy.deepcopy(subject.dense)
    model.set_attn_implementation("sdpa")
    architecture = architecture_of(model)
    for layer in architecture.layers(encoder_of(model)):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Dropout) and name not in (
                architecture.attention_dropout,
                architecture.ffn_dropout,
            ):
                module.p = 0.0  # that on attention probabilities
    return model.to(dtype=dtype), lambda inputs, labels: model(**inputs, labels=labels).loss


def _ours(
    enabled: bool, *, pruned: bool = False, graphed: bool = False
) -> Callable[[Subject, torch.dtype], tuple[nn.Module, Loss]]:
    def make(subject: Subject, dtype: torch.dtype) -> tuple[nn.Module, Loss]:
        model: Any = copy.deepcopy(subject.skimming)
        skimming = skimming_of(model)
        skimming.enabled, skimming.config.pruned_training, skimming.graphed_training = enabled, pruned, graphed
        return model.to(dtype=dtype), lambda inputs, labels: model(**inputs, labels=labels).loss

    return make


def _published(subject: Subject, dtype: torch.dtype) -> tuple[nn.Module, Loss]:
    skimming = skimming_of(subject.skimming)
    dense: Any = copy.deepcopy(subject.dense)
    published = PublishedTraining(dense, copy.deepcopy(skimming.predictors), skimming.config.temperature)
    model: Any = published.model

    def loss(inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        task = model(**inputs, labels=labels).loss
        assert published.skim_loss is not None
        if (records := current_records()) is not None:
            ends = F.pad(inputs["attention_mask"].sum(1).cumsum(0), (1, 0)).int()
            batch, length = inputs["input_ids"].shape
            records.append(SkimRecord((batch, length), ends, skim_loss=published.skim_loss))
        return task + skimming.config.skim_weight * published.skim_loss

    return model.to(dtype=dtype), loss


# name -> maker, in the order of the table. Those that skim have their skim weight in the loss.
LEARNERS: dict[str, Callable[[Subject, torch.dtype], tuple[nn.Module, Loss]]] = {
    DENSE: _dense,
    DENSE_PACKED: _ours(False),
    PUBLISHED: _published,
    PACKED: _ours(True),
    PRUNED: _ours(True, pruned=True),
}
# Also on a GPU.
GRAPHED_LEARNERS = {DENSE_GRAPHED: _ours(False, graphed=True), GRAPHED: _ours(True, graphed=True)}
SKIMS = (PUBLISHED, PACKED, PRUNED, GRAPHED)


def measure(
    setting: Setting, subject: Subject, batches: Sequence[Batch], repeats: int, limits: Limits
) -> list[dict[str, Any]]:
    """A row per learner: kind, workload, tokens, contender, seconds, repeats, median_s (for all batches, a step each),
    spread, tokens_per_s, speedups, peak_memory, max_difference, tolerance; of those that skim, tokens_kept: share of
    the real tokens that layers work on, in draws after the timing, and tokens_scheduled: what the schedule keeps of
    them (None where decisions are learned).

    Raises:
        ValueError: a learner's loss, with nothing skimmed and no dropout, is not the dense model's.
    """
    dtype = DTYPES[setting.dtype]
    subject, scheduled = _by_schedule(subject, batches)
    expected = [float(loss) for loss in _reference_losses(subject, batches)]
    learners: list[Learner] = []
    differences: dict[str, float] = {}
    memory: dict[str, int | None] = {}
    for name, make in (LEARNERS | (GRAPHED_LEARNERS if setting.device == "cuda" else {})).items():
        watch = PeakMemory(setting.device)
        learner = Learner(name, *make(subject, dtype))
        weight = skimming_of(subject.skimming).config.skim_weight if name in SKIMS else 0.0
        differences[name] = _check(learner, batches, [loss + weight for loss in expected], setting)
        for measured in (False, True):  # the first steps capture graphs, and make the optimizer's states
            if measured:
                watch.reset()
            for batch in batches:
                learner.step(batch.inputs)
        memory[name] = _with_graphs(watch.peak(), learner)
        learners.append(learner)
    field = [Contender(learner.name, learner.step) for learner in learners]
    seconds = time_in_turn(field, batches, repeats, DENSE_PACKED, limits, setting.device)
    tokens = sum(int(batch.lengths.sum()) for batch in batches)
    notes = {learner.name: _note(learner) for learner in learners}
    kept = {learner.name: _tokens_kept(learner, batches) for learner in learners}
    return [
        {
            "kind": KIND,
            "workload": setting.to_dict(),
            "tokens": tokens,
            "contender": name,
            "seconds": times,
            "repeats": len(times),
            "median_s": statistics.median(times),
            "spread": relative_spread(times),
            "tokens_per_s": tokens / statistics.median(times),
            "speedups": {other: paired_speedup(theirs, times) for other, theirs in seconds.items() if other != name},
            "peak_memory": memory[name],
            "max_difference": differences[name],
            "tolerance": TOLERANCES[setting.dtype],
            "tokens_kept": kept[name],
            "tokens_scheduled": scheduled if name in SKIMS else None,
        }
        | notes[name]
        for name, times in seconds.items()
    ]


def _with_graphs(peak: int | None, learner: Learner) -> int | None:
    """With the activations of graphs, which torch does not count as allocated while these replay."""
    graphs = learner.graphs
    return peak if peak is None or graphs is None else peak + graphs.pool_bytes


def _note(learner: Learner) -> dict[str, str]:
    """For a row that would have to be of graphs and is not."""
    graphs = learner.graphs
    if graphs is None or graphs.why_eager is None:
        return {}
    return {"note": f"without graphs: {graphs.why_eager}"}


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """Class 0 and class 1 in turn: what is learned does not matter here."""
    ids = inputs["input_ids"]
    return torch.arange(ids.size(0), device=ids.device) % 2


def _by_schedule(subject: Subject, batches: Sequence[Batch]) -> tuple[Subject, float | None]:
    """With predictors that draw by the subject's schedule, and the share of tokens that it keeps, where it has one."""
    ratios = skimming_of(subject.skimming).config.schedule
    if ratios is None:
        return subject, None
    skimming: Any = copy.deepcopy(subject.skimming).train()
    return replace(subject, skimming=skimming), draw_by_schedule(skimming, batches, ratios)


@torch.no_grad()
def _tokens_kept(learner: Learner, batches: Sequence[Batch]) -> float | None:
    """Share of the real tokens that layers work on, as drawn now; None for those that skim nothing."""
    with record_skimming() as records:
        for batch in batches:
            learner.loss(batch.inputs, labels_of(batch.inputs))
    tokens = [int(record.lengths.sum()) for record in records]
    shares = [float(record.skim_loss) for record in records if record.skim_loss is not None]
    return statistics.fmean(shares, tokens) if shares else None


@torch.no_grad()
def _reference_losses(subject: Subject, batches: Sequence[Batch]) -> list[Tensor]:
    model: Any = copy.deepcopy(subject.dense).eval()
    model.set_attn_implementation("eager")
    return [model(**batch.inputs, labels=labels_of(batch.inputs)).loss for batch in batches]


@torch.no_grad()
def _check(learner: Learner, batches: Sequence[Batch], expected: Sequence[float], setting: Setting) -> float:
    """Largest relative difference of a loss from the expected one."""
    with _dropout_off(learner.model), _keeping_all(learner.model):
        losses = [float(learner.loss(batch.inputs, labels_of(batch.inputs))) for batch in batches]
    apart = [abs(loss - right) / abs(right) for loss, right in zip(losses, expected, strict=True)]
    worst = float(torch.tensor(apart, dtype=torch.float64).max())  # Python's max() may pass over NaN
    if not worst <= TOLERANCES[setting.dtype]:
        raise ValueError(f"{learner.name}: its loss differs from the dense model's by {worst:.1e}, relatively")
    return worst


@contextlib.contextmanager
def _dropout_off(model: nn.Module) -> Iterator[None]:
    modules = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [module.p for module in modules]
    for module in modules:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in zip(modules, before, strict=True):
            module.p = p


@contextlib.contextmanager
def _keeping_all(model: nn.Module) -> Iterator[None]:
    """No draw skims anything: the loss is then the dense model's plus the skim weight."""
    predictors = [module for module in model.modules() if isinstance(module, SkimPredictor)]
    before = [predictor.out.bias.detach().clone() for predictor in predictors]
    for predictor in predictors:
        predictor.out.bias[KEEP], predictor.out.bias[SKIM] = _KEEP_ALL_LOGIT, -_KEEP_ALL_LOGIT
    try:
        yield
    finally:
        for predictor, bias in zip(predictors, before, strict=True):
            predictor.out.bias.copy_(bias)
