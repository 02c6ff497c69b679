"""Which kernels the models of these tests run on."""

from __future__ import annotations

import pytest

from transkimmer_kernels import kernel_set
from transkimmer_kernels.runtime.graphs import ENGINES

from .graphed_steps import StepTapes
from .tiny import KERNELS


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "default_kernels(reason): skipped where TRANSKIMMER_KERNELS chooses the kernels")


@pytest.fixture(autouse=True)
def chosen_kernels(request: pytest.FixtureRequest) -> None:
    """The kernels that TRANSKIMMER_KERNELS names serve every operator: nothing falls back to others."""
    if len(KERNELS) > 1:
        return
    assert set(kernel_set("auto", "cpu").serves.values()) == set(KERNELS)
    if (marker := request.node.get_closest_marker("default_kernels")) is not None:
        pytest.skip(f"{KERNELS[0]}: {marker.args[0]}")


@pytest.fixture
def step_tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training by graphs works on a CPU, where tapes stand for the graphs."""
    monkeypatch.setitem(ENGINES, "cpu", StepTapes)
