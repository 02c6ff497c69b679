"""The sizes that training graphs are captured for: room for what is left over, and few of them."""

from __future__ import annotations

import pytest
import torch
from transkimmer.graphed_training import GraphedTraining, graph_size

pytestmark = pytest.mark.default_kernels("runs no kernels")


@pytest.mark.parametrize("count", [1, 7, 31, 32, 33, 100, 6825, 50_000])
@pytest.mark.parametrize("longest", [1, 5, 128])
def test_room_for_what_is_left_over(count: int, longest: int) -> None:
    size = graph_size(count, 3, longest)
    assert 0 <= size.capacity - count < max(count / 16, 32)
    assert size.spare * size.longest >= size.capacity - count and size.longest >= longest
    assert GraphedTraining().bytes_held == 0


def test_sizes_of_a_data_set_fit() -> None:
    """Batches of lengths that are spread widely recur in fewer sizes than are kept."""
    torch.manual_seed(0)
    for mean, deviation, batch, limit in ((26, 11, 32, 512), (40, 17, 32, 512), (80, 30, 32, 128)):
        lengths = torch.randn(400, batch).mul(deviation).add(mean).clamp(3, limit).long()
        sizes = {graph_size(int(row.sum()), batch, int(row.max())) for row in lengths}
        assert len(sizes) <= 40
