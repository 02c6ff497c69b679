"""The workload of the bench tests: four sequences of random tokens in two batches, on a tiny classifier."""

from __future__ import annotations

from transkimmer.bench import setting, workload

from ..models.tiny import VOCABULARY

RATIOS = [1.0, 0.6, 0.2]
LENGTHS = [9, 4, 14, 6]
SETTING = setting.Setting("tiny", "some", "1,0.6,0.2", 2, 2, "fp32", "cpu", 1)
TORCH_ONLY = ("eager", "sdpa", "nested", "plain", "keep-all", "skimming")  # keys of peers that need nothing else


def batches() -> list[workload.Batch]:
    return workload.random_batches(LENGTHS, 2, 2, VOCABULARY)
