"""Compiles the candidates of a shape class on several processes, before they are measured on one."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Executor
from typing import Any

import torch

from .. import tuning
from ..tuning import Tunable
from .problems import PROBLEMS, tunables


def compile_candidates(
    pool: Executor, tunable: Tunable[Any], dtype: torch.dtype, sizes: tuple[int, ...], deadline: float
) -> None:
    """Fills Triton's cache on disk from several processes; compiling is most of a search, and row counts do not matter.

    Whatever fails will fail again, and be noted, in `search`.
    """
    work = [
        pool.submit(compile_one, tunable.operator, dtype, sizes, config._asdict(), "cuda")
        for config in dict.fromkeys(tunable.candidates(dtype, *sizes))
    ]
    for future in work:
        with contextlib.suppress(Exception):
            future.result(max(deadline - time.monotonic(), 0))
    for future in work:
        future.cancel()


def compile_one(operator: str, dtype: torch.dtype, sizes: tuple[int, ...], fields: dict[str, Any], device: str) -> None:
    """Runs one configuration on a few rows; `fields`: of the configuration, whose class need not travel."""
    default: Any = tunables()[operator].default(dtype, *sizes)
    call = PROBLEMS[operator].make(dtype, sizes, (64, 1), torch.device(device))
    with tuning.forced(operator, type(default)(**fields)):
        call("triton", dtype)
