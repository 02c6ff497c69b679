"""Options of the benchmarks, the device's ceilings, and what both leave in the results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from . import roofline
from .sizes import ON_GPU


def pytest_configure(config: pytest.Config) -> None:
    if not ON_GPU:
        # Nothing is timed, so nothing can be mistaken for a figure.
        config.option.benchmark_disable, config.option.benchmark_enable = True, False


@pytest.fixture(autouse=True)
def prepare() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def ceilings() -> roofline.Ceilings:
    return roofline.ceilings()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    measured = roofline.ceilings()
    machine_info["copy_bytes_per_s"] = measured.bytes_per_s
    machine_info["matmul_bf16_flops_per_s"] = measured.flops_per_s
