"""The gate on compiled CUDA kernels: none spills, on any architecture; and the table in the docs is theirs."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from transkimmer_kernels import native, resources
from transkimmer_kernels.resources import Usage

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/cuda.md"
KERNELS = ("compact_kernel", "move_rows_kernel", "short_attention_kernel", "skim_logit_kernel", "sum_heads_kernel")


@pytest.fixture(scope="module")
def usages() -> list[Usage]:
    if (reason := resources.why_not()) is not None:
        pytest.skip(reason)
    return resources.read(native.status()["cuda"].path)


def test_no_kernel_spills(usages: list[Usage]) -> None:
    assert not resources.problems(usages)


def test_every_kernel_is_there_for_every_architecture(usages: list[Usage]) -> None:
    architectures = {u.architecture for u in usages}
    for name in {u.kernel for u in usages}:
        assert {u.architecture for u in usages if u.kernel == name} == architectures, name
    for name in KERNELS:
        assert any(u.kernel.startswith(name) for u in usages), name


def test_registers_let_the_block_start(usages: list[Usage]) -> None:
    """A kernel that needs more registers than a multiprocessor has for its block fails at launch, and only there."""
    for u in usages:
        assert 0 < u.registers <= resources.MOST_REGISTERS


def test_the_document_shows_this_table(usages: list[Usage]) -> None:
    table = resources.documented(DOCUMENT.read_text(encoding="utf-8"))
    here = resources.markdown(usages)
    if table.splitlines()[0] != here.splitlines()[0] or table.splitlines()[2] != here.splitlines()[2]:
        pytest.skip(f"the document's table is of another compiler or other architectures: {table.splitlines()[0]}")
    assert table == here, f"run: python -m transkimmer_kernels.resources --update {DOCUMENT.relative_to(ROOT)}"


def test_the_document_shows_how_full_tiles_are() -> None:
    """The figures of the C++ self-check, which applies the rule that the kernel applies to the stored lengths."""
    program = ROOT / "build/cmake/attention_fill_test"
    if not program.is_file():
        pytest.skip("the C++ self-checks are not built; make test does that")
    file = ROOT / "python/transkimmer/bench/lengths.json"
    printed = subprocess.run([program, file], capture_output=True, text=True, check=True).stdout
    names = json.loads(file.read_text("utf-8"))
    cells = [line.replace("%", " %") for line in printed.splitlines() if line.startswith(tuple(names))]
    expected = {"| " + " | ".join(re.findall(r"\w+(?:\.\d+)?(?: %)?", line)) + " |" for line in cells}
    begun = tuple(f"| {name} |" for name in names)
    assert {line for line in DOCUMENT.read_text("utf-8").splitlines() if line.startswith(begun)} == expected
    assert len(expected) == len(names)


def test_a_spill_is_found() -> None:
    output = [
        "Fatbin elf code:",
        "arch = sm_80",
        "Resource usage:",
        " Function _ZN11transkimmer12_GLOBAL__N_116move_rows_kernelIhLb1EEEvNS_17MoveRowsArgumentsEli:",
        "  REG:40 STACK:16 SHARED:128 LOCAL:0 CONSTANT[0]:428 TEXTURE:0 SURFACE:0 SAMPLER:0",
    ]
    usage = Usage("move_rows_kernel<uint8, true>", "sm_80", 40, 128, 16)
    assert resources.parse(output) == [usage]
    assert resources.problems([usage]) == ["move_rows_kernel<uint8, true> on sm_80: 16 bytes of local memory"]


def test_the_library_is_small() -> None:
    path = native.status()["cuda"].path
    if not path.is_file():
        pytest.skip(f"{path.name} was not built here")
    assert path.stat().st_size < 20 * 2**20


def test_architectures_are_in_order_of_their_numbers() -> None:
    lines = []
    for architecture in ("sm_100a", "sm_90"):
        lines += [f"arch = {architecture}", " Function kernel:", "  REG:10 STACK:0 SHARED:0 LOCAL:0"]
    assert [usage.architecture for usage in resources.parse(lines)] == ["sm_90", "sm_100a"]


@pytest.mark.parametrize("local", [0, 16])
def test_a_spill_is_an_exit_status(
    local: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resources, "why_not", lambda: None)
    monkeypatch.setattr(resources, "read", lambda path: [Usage("kernel", "sm_90", 10, 0, local)])
    assert resources.main([]) == bool(local)
    assert ("16 bytes of local memory" in capsys.readouterr().out) == bool(local)
