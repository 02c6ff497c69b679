"""Fixtures of every test: `target` runs a test once per backend and device, or says why it does not."""

from __future__ import annotations

import os

# Threads that wait for each other must not spin: a busy machine would run the suite ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

from .target import TARGETS, Target

# Reproducible everywhere: no random seeds, no example database, no deadline on a busy machine.
hypothesis.settings.register_profile("transkimmer", derandomize=True, database=None, deadline=None, max_examples=60)
hypothesis.settings.load_profile("transkimmer")


@pytest.fixture(scope="session", params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "operators(*names): what a test with `target` runs; skipped where unavailable")


@pytest.fixture(autouse=True)
def prepare(request: pytest.FixtureRequest) -> None:
    """Seeds; and skips, with the registry's reason, what the test's target cannot serve."""
    torch.manual_seed(0)
    marker = request.node.get_closest_marker("operators")
    if marker is not None:
        request.node.callspec.params["target"].require(*marker.args)
