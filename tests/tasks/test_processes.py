"""transkimmer train in processes of its own: killed, and several side by side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transkimmer.cli import main

from .test_commands import backbone, data

__all__ = ["backbone", "data"]  # fixtures

# 7 steps an epoch, a checkpoint after every tenth.
LONG = ["--batch-size", "8", "--dense-epochs", "1", "--epochs", "20", "--save-steps", "10"]
LONG += ["--flops-speedup", "1", "--bias-init", "1"]
PATIENCE_S = 600


def command(backbone: Path, data: Path, output: Path) -> list[str]:
    return ["train", "--task", "sst2", "--data", str(data), "--backbone", str(backbone), "--output", str(output)]


def test_a_killed_run_ends_with_the_same_result(tmp_path: Path, backbone: Path, data: Path) -> None:
    assert main([*command(backbone, data, tmp_path / "whole"), *LONG]) == 0
    parts = tmp_path / "parts"
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "transkimmer", *command(backbone, data, parts), *LONG],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + PATIENCE_S
    while not list((parts / "skimming").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (parts / "run.json").exists()
    assert main([*command(backbone, data, parts), *LONG, "--resume"]) == 0
    whole, resumed = (load_file(run / "model/model.safetensors") for run in (tmp_path / "whole", parts))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, "-m", "transkimmer", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_train_one_model(tmp_path: Path, backbone: Path, data: Path) -> None:
    few = ["--batch-size", "4", "--dense-epochs", "1", "--epochs", "2", "--flops-speedup", "1", "--bias-init", "1"]
    arguments = [*command(backbone, data, tmp_path / "run"), *few]
    found = torchrun(*arguments)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(f"wrote {tmp_path}") == 1
    document = json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))
    assert document["rows"] == {"train": 54, "held_out": 6, "dev": 12}
    assert document["dev"]["threshold"]["examples"] == 12
    assert document["curves"]["skimming"][-1]["step"] == 14  # of 2 x 4 of the 54 rows, twice
    again = torchrun(*arguments)
    assert again.returncode != 0 and again.stderr.count("holds a run already; go on with --resume") == 2
