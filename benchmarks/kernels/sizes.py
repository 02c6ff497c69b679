"""How large the measured problems are: BERT-base on real lengths, or something tiny where nothing is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transkimmer.bench.workload import known_lengths, parse_schedule
from transkimmer.policies import scheduled_count

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16

WIDTH, HEADS, FFN = (768, 12, 3072) if ON_GPU else (64, 2, 96)
BATCH = 128 if ON_GPU else 3
COMPACT_TOKENS = 65536 if ON_GPU else 70
LAYERS = 12
DATA_SETS = ("sst2", "mrpc", "rte", "imdb") if ON_GPU else ("sst2",)
# Layers of the paper's schedules that stand for all of them; None: nothing is skimmed.
STATES = (None, 0, 4, 8, 11) if ON_GPU else (None, 11)


@dataclass(frozen=True)
class Workload:
    """A batch of one data set's real lengths, as it arrives at one layer of a synthetic schedule.

    layer: of the schedule; None: every token is there.
    """

    data_set: str
    layer: int | None

    def __str__(self) -> str:
        return f"{self.data_set}-{'full' if self.layer is None else f'layer{self.layer}'}"

    @property
    def full(self) -> tuple[int, ...]:
        return tuple(known_lengths()[self.data_set][:BATCH])

    @property
    def lengths(self) -> tuple[int, ...]:
        if self.layer is None:
            return self.full
        ratio = parse_schedule(self.data_set, LAYERS)[self.layer]
        return tuple(scheduled_count(torch.tensor(self.full), ratio).tolist())

    @property
    def spare(self) -> int:
        """Capacity beyond the token count: lists keep, from layer to layer, the capacity of the whole batch."""
        return sum(self.full) - sum(self.lengths)


WORKLOADS = [Workload(name, layer) for name in DATA_SETS for layer in STATES]
# Where the number of sequences says nothing, only that of the rows.
ROW_WORKLOADS = [Workload(DATA_SETS[min(1, len(DATA_SETS) - 1)], layer) for layer in STATES if layer in (None, 4, 11)]
