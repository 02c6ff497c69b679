"""benchmarks/cpu_kernels.py and what it shares: both sides agree, and a wrong one is not timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cpu_kernels, single_runs
from transkimmer_kernels import native
from transkimmer_kernels.onednn import can_pack

from ..clock import Clock

needs_kernels = pytest.mark.skipif(not native.status()["cpu"].loaded, reason="native CPU kernels are not built")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def case(request: pytest.FixtureRequest) -> cpu_kernels.Case:
    return cpu_kernels.Case(0.15, request.param)


@needs_kernels
@pytest.mark.parametrize("name", cpu_kernels.OPERATORS)
@torch.inference_mode()
def test_both_sides_agree(case: cpu_kernels.Case, name: str) -> None:
    hidden = case.hidden.clone()
    cpu_kernels.check(case, name, cpu_kernels.OPERATORS[name](case))
    assert torch.equal(case.hidden, hidden)


@needs_kernels
@torch.inference_mode()
def test_the_rival_multiplies_by_its_own_layout(case: cpu_kernels.Case) -> None:
    bias = case.normal(cpu_kernels.WIDTH)
    expected = torch.nn.functional.linear(case.x, case.weight, bias)
    error = 1e-4 if case.dtype_name == "fp32" else 0.05
    torch.testing.assert_close(case.product(case.x, bias), expected, rtol=error, atol=error)
    assert case.weight_of_others.is_mkldnn == can_pack(case.dtype)


@needs_kernels
@torch.inference_mode()
def test_a_wrong_result_is_not_timed(case: cpu_kernels.Case) -> None:

    def change() -> None:
        case.hidden.mul_(1.5)

    lists, ends = torch.tensor([1, 2, 3, 9]), torch.tensor([0, 2, 3])
    cpu_kernels.check(case, "x", (lambda: (lists, ends), lambda: (lists[:3], ends)))  # what lies beyond does not count
    with pytest.raises(ValueError, match=r"x: results differ by 5.0e-01 of the largest"):
        cpu_kernels.check(case, "x", (lambda: (lists, ends), lambda: (torch.tensor([1, 2, 2]), ends)))
    with pytest.raises(ValueError, match=r"x: results differ by nan"):
        cpu_kernels.check(case, "x", (lambda: case.x * torch.nan, lambda: case.x))
    with pytest.raises(ValueError, match=r"x: results differ"):
        cpu_kernels.check(case, "x", (change, lambda: None))
    with pytest.raises(ValueError, match=r"x: shapes differ"):
        cpu_kernels.check(case, "x", (lambda: case.x, lambda: case.x[:1]))


def test_contenders_take_turns_after_rounds_that_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(monkeypatch), []

    def run(name: str) -> None:
        calls.append(name)
        clock.sleep(9.0 if len(calls) <= 4 else {"a": 1.0, "b": 2.0}[name])

    field = {name: lambda name=name: run(name) for name in "ab"}
    found = single_runs.median_seconds(field, 3, 1, lambda: (calls.append("-"), clock.sleep(50.0)))
    assert "".join(calls) == "-a-b" * 4 and found == {"a": 1.0, "b": 2.0}


def test_rows_are_written_with_the_environment(tmp_path: Path) -> None:
    single_runs.write(None, "title", [])
    single_runs.write(tmp_path / "rows.json", "title", [{"name": "a"}])
    document = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert list(document) == ["title", "environment", "rows"] and document["rows"] == [{"name": "a"}]
    assert document["environment"]["torch"] == torch.__version__
