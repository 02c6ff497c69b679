"""The contenders of one workload: built, checked against reference answers, and only then there to be timed."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import record_skimming
from . import workload
from .counters import PeakMemory
from .masked import MaskedReference
from .peers import PEERS, Peer, Run, Subject
from .setting import Setting
from .timing import synchronize
from .workload import Batch

# Characters that are kept of the message of a contender that failed.
_MESSAGE = 240
# Largest difference from the fp32 answers, over the largest of them. Ignoring the padding mask makes it about 0.2.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass
class Built:
    """A contender that is ready to run. build_s: seconds that took; memory: bytes it takes at rest, None if unknown."""

    peer: Peer
    run: Run
    build_s: float
    memory: int | None


@dataclass
class Checked:
    """A contender that gives the right answers.

    max_difference: from the reference, see TOLERANCES; peak_memory: bytes, at rest and while it ran; layer_lengths:
    int64 [layers, sequences of all batches], the tokens it worked on, where it skims.
    """

    built: Built
    max_difference: float
    peak_memory: int | None
    layer_lengths: list[Tensor] | None


class WrongAnswersError(ValueError):
    """A contender's answers are not the reference's."""


class Field:
    """Builds contenders, those of others once for all workloads of a model and dtype, and checks them on each.

    Args:
        left_out: keys of peers.
        budget_s: another's contender that would take longer for all batches of a workload is left out of that.
    """

    def __init__(self, left_out: Sequence[str] = (), budget_s: float = math.inf) -> None:
        self._left_out = left_out
        self._budget_s = budget_s
        self._made_for: tuple[str, str, str] | None = None
        self._kept: dict[str, Built | str] = {}

    def enter(self, setting: Setting, subject: Subject, batches: Sequence[Batch]) -> list[tuple[Peer, Checked | str]]:
        """Every peer with its checked self, or with the reason why it is not there.

        Raises:
            WrongAnswersError: a contender's answers are not the reference's.
            Exception: one of ours cannot be built or run; another peer that cannot is left out with its message.
        """
        made_for = (setting.model, setting.dtype, setting.device)
        if made_for != self._made_for:
            self._made_for, self._kept = made_for, {}
        with torch.no_grad():
            reference = Reference(subject, batches)
            return [(peer, self._enter(peer, setting, subject, batches, reference)) for peer in PEERS]

    def _enter(
        self, peer: Peer, setting: Setting, subject: Subject, batches: Sequence[Batch], reference: Reference
    ) -> Checked | str:
        if peer.key in self._left_out:
            return f"left out: --without {peer.key}"
        built = self._kept.get(peer.key) or peer.why_not(setting.device, setting.dtype)
        try:
            if built is None:
                built = _build(peer, subject, setting, batches[0])
                if not peer.ours:
                    self._kept[peer.key] = built
            if isinstance(built, str):
                return built
            memory = PeakMemory(setting.device)
            memory.reset()
            if not peer.ours and (seconds := self._too_long(built, setting, batches)):
                return f"left out: {seconds:.0f} s for one batch; {len(batches)} batches would exceed --budget"
            return _check(built, setting, batches, reference, memory)
        except WrongAnswersError:
            raise
        except Exception as error:  # packages have classes of their own, which have no base in common
            if peer.ours:
                raise
            self._kept[peer.key] = reason = f"failed: {_in_one_line(error)}"
            return reason

    def _too_long(self, built: Built, setting: Setting, batches: Sequence[Batch]) -> float | None:
        """Seconds for the first batch, where all of them would exceed the budget. The first call may compile."""
        for _ in range(2):
            start = time.perf_counter()
            built.run(batches[0].inputs)
            synchronize(setting.device)
            seconds = time.perf_counter() - start
            if seconds * len(batches) <= self._budget_s:
                return None
        return seconds


def _in_one_line(error: Exception) -> str:
    """Its class and message. A long one loses its middle: some say at the start what happened, others at the end."""
    message = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    if len(message) <= _MESSAGE:
        return message
    half = (_MESSAGE - len(" ... ")) // 2
    return f"{message[:half].rstrip()} ... {message[-half:].lstrip()}"


def _build(peer: Peer, subject: Subject, setting: Setting, first: Batch) -> Built:
    """With a first call in it, which compiles, tunes and prepares weights."""
    # What will be timed, where every size is a constant until another comes and compiling takes a minute. Else two
    # sequences of two lengths, so that no size is taken for a constant and no mask for superfluous.
    two = workload.random_batches([12, 7], 2, 1, subject.dense.config.vocab_size)[0]
    example = first.inputs if peer.compiles_sizes else two.to(setting.device).inputs
    memory = PeakMemory(setting.device)
    start = time.perf_counter()
    with _quiet():
        run = peer.build(subject, example, setting.dtype)
        run(example)
    synchronize(setting.device)
    seconds = time.perf_counter() - start
    memory.reset()
    return Built(peer, run, seconds, memory.peak())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of what might go wrong; the answers show whether it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _check(
    built: Built, setting: Setting, batches: Sequence[Batch], reference: Reference, memory: PeakMemory
) -> Checked:
    answers, masks, lengths = [], [], []
    for batch in batches:
        with record_skimming() as records:
            answers.append(built.run(batch.inputs).float().clone())
        if built.peer.works_on == "kept":
            masks.append(records[0].keep_masks)
            lengths.append(records[0].layer_lengths)
    synchronize(setting.device)
    rise, rest = memory.peak(), built.memory
    difference = reference.difference(answers, masks or None)
    tolerance = TOLERANCES[setting.dtype]
    if not difference <= tolerance:  # not a number neither
        raise WrongAnswersError(
            f"{built.peer.name}: answers differ from the reference by {difference:.1e} of the largest, "
            f"at most {tolerance} is {setting.dtype}'s error"
        )
    peak = None if rise is None or rest is None else rest + rise
    return Checked(built, difference, peak, lengths or None)


class Reference:
    """Answers in fp32 and plain PyTorch: Hugging Face's eager ones, and those of the same model masked by decisions."""

    def __init__(self, subject: Subject, batches: Sequence[Batch]) -> None:
        dense = copy.deepcopy(subject.dense)
        dense.set_attn_implementation("eager")
        self._batches = batches
        self._dense = [dense(**batch.inputs).logits for batch in batches]
        self._masked = MaskedReference(dense)

    def difference(self, answers: Sequence[Tensor], keep_masks: Sequence[Tensor] | None) -> float:
        """Largest difference of `answers` over the largest reference; `keep_masks`: a skimming run's, by batch."""
        expected = self._dense
        if keep_masks is not None:
            pairs = zip(self._batches, keep_masks, strict=True)
            expected = [self._masked(batch.inputs, masks) for batch, masks in pairs]
        scale = max(float(logits.abs().max()) for logits in expected)
        worst = torch.stack([(a - b).abs().max() for a, b in zip(answers, expected, strict=True)]).max()
        return float(worst) / scale
