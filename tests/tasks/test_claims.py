"""Two runs do not write into one folder."""

from __future__ import annotations

import fcntl
import gc
import os
from pathlib import Path

import pytest
from transkimmer.tasks import TEXT_TASKS
from transkimmer.training.output import prepare_output
from transkimmer.training.recipe import Recipe
from transkimmer.training.run import Run


def job(output: Path) -> Run:
    return Run(TEXT_TASKS["rte"], Recipe("dense"), "tiny", output)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_where_another_process_is_at_work(tmp_path: Path, resume: bool) -> None:
    output = tmp_path / "run"
    output.mkdir()
    if resume:
        prepare_output(job(output), resume=False)
        gc.collect()
        (output / "dense").mkdir()
    before = sorted(path.name for path in output.iterdir())
    other = os.open(output, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)  # of another open file, as of another process
    with pytest.raises(ValueError, match=r"--output .*run: another run is at work there"):
        prepare_output(job(output), resume)
    assert sorted(path.name for path in output.iterdir()) == before
    os.close(other)
    held = job(output)
    prepare_output(held, resume)
    prepare_output(job(output), resume)  # one process may go on with a run that it has begun
    other = os.open(output, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    del held
    gc.collect()
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
