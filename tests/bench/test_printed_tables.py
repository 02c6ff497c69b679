"""The tables that `bench model` and `bench training` print: every column has its own figure, in its unit."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from transkimmer.bench import model_command, training

ROW: dict[str, Any] = {"contender": "dense", "note": None, "median_s": 0.5, "tokens_per_s": 1234.5}
ROW |= {"workload": {"batches": 4}, "max_difference": 2e-5}


def cells_of(table: Table, number: int) -> dict[str, str]:
    """Header -> cell of a row."""
    return {str(column.header): list(column.cells)[number] for column in table.columns}


def test_cells_of_the_model_table() -> None:
    """A median is by batch, and skimming's speedup stands in the other's row."""
    row = ROW | {"spread": 0.25, "repeats": 3, "roofline_share": 0.31, "flops_speedup": 1.1}
    row |= {"flops_speedup_padded": 2.2, "wall_clock_speedup": 3.3, "skim_efficiency": 0.44, "launches": None}
    row |= {"host_syncs": 7, "peak_memory": 300 * 2**20, "speedups": {"skimming": 0.2}}
    skimming = row | {"contender": "skimming", "speedups": {"dense": 5.5}}
    assert cells_of(model_command.model_table([row, skimming], ""), 0) == {
        **{"": "dense", "median": "125.0 ms", "±": "25%", "repeats": "3", "tokens/s": "1,234"},
        **{"roofline": "31%", "FLOPs ×": "1.10", "padded ×": "2.20", "wall-clock ×": "3.30", "efficiency": "0.44"},
        **{"skimming is ×": "5.50", "launches": "–", "syncs": "7", "peak MiB": "300", "difference": "2e-05"},
    }


def test_cells_of_the_training_table() -> None:
    row = ROW | {"spread": None, "repeats": 1, "tokens_kept": None, "peak_memory": None}
    packed = row | {"contender": training.PACKED, "speedups": {"dense": 3.5}, "tokens_kept": 0.625}
    pruned = row | {"contender": training.PRUNED, "speedups": {"dense": 7.5}}
    table = model_command.training_table([row | {"speedups": {training.PACKED: 0.1}}, packed, pruned], "")
    first, second = (list(cells_of(table, number).values()) for number in (0, 1))
    assert first == ["dense", "125.0 ms", "–", "1", "1,234", "3.50", "–", "–", "2e-05"]
    assert second[5:7] == ["–", "62%"]
