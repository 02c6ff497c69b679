"""Arguments of the package's commands that name nothing: a line that says what is allowed, and a bad exit status."""

from __future__ import annotations

from pathlib import Path

import pytest

from transkimmer_kernels import aot, resources, triton_support
from transkimmer_kernels.tune import __main__ as tune


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--operators", "nonsense", "compact"],
            r"--operators nonsense: must be among add_norm, choose_rows, compact, embed_tokens, ragged",
        ),
        (["--targets", "sm_1x"], r"argument --targets: 'sm_1x': must look like sm_80, sm_90, sm_100 or gfx942"),
        (["--targets", "sm_80", "90"], r"argument --targets: '90': must look like"),
    ],
)
def test_aot(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if (reason := triton_support.why_not_importable()) is not None:
        pytest.skip(reason)
    if triton_support.interpreted():
        pytest.skip("under TRITON_INTERPRET=1 nothing is compiled")
    with pytest.raises(SystemExit) as ended:
        aot.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operators", "nonsense"], "argument --operators: invalid choice: 'nonsense'"),
        (["--sizes", "384", "7"], "--sizes 7: must be among 32, 64, 128, 384, 768, 1024 for these operators"),
        (["--operators", "skim_logit", "--sizes", "64"], "--sizes 64: must be among 384, 768, 1024 for these"),
        (["--minutes", "0"], "--minutes 0: must be above 0"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
    ],
)
def test_tune(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tune.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_resources(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"absent.md: is not a file"):
        resources.update(tmp_path / "absent.md", "table")
