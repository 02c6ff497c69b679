"""What is there without the packages of the extra `train`: everything but training, which says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transkimmer.cli import TRAINING_PACKAGES

WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({packages!r}))
from transkimmer.cli import main
sys.exit(main({arguments!r}))
"""


def _without_extras(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = WITHOUT.format(packages=[*TRAINING_PACKAGES, "matplotlib"], arguments=list(arguments))
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["bench", "profile", "train", "evaluate", "train-demo"])
def test_every_command_can_be_asked_for_help(command: str) -> None:
    result = _without_extras(command, "--help")
    assert result.returncode == 0, result.stderr
    assert f"transkimmer {command}" in result.stdout


def test_training_names_what_it_needs(tmp_path: Path) -> None:
    result = _without_extras("train", "--task", "rte", "--data", str(tmp_path), "--output", str(tmp_path / "run"))
    assert result.returncode == 2
    assert result.stderr.endswith("transkimmer train: needs accelerate; run: pip install 'transkimmer[train]'\n")
    assert not (tmp_path / "run").exists()
