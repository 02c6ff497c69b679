"""benchmarks/cpu_kernels.py, packing.py and what they share: both sides agree, and what is timed gets into rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cpu_kernels, packing, single_runs
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


def test_the_median_of_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = Clock(monkeypatch), iter([9.0, 1.0, 7.0, 2.0])
    assert single_runs.median_seconds({"a": lambda: clock.sleep(next(times))}, 3, 1) == {"a": 2.0}


def rows_of(script: Any, path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict[str, Any]]:
    monkeypatch.setattr("sys.argv", [script.__name__, *options, "--json", str(path)])
    script.main()
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_rows_of_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "KEPT", (0.5,))
    monkeypatch.setattr(cpu_kernels, "OPERATORS", {"x": lambda case: ("ours", "plain")})
    monkeypatch.setattr(cpu_kernels, "Case", lambda kept, dtype: SimpleNamespace(tokens=7))
    monkeypatch.setattr(cpu_kernels, "check", lambda *arguments: None)

    def median_seconds(field: dict[str, str], repeats: int, warm_up: int, between: object) -> dict[str, float]:
        assert field == {"ours": "ours", "plain": "plain"}
        return {"ours": 2e-6, "plain": 3e-6} if between is None else {"ours": 4e-6, "plain": 10e-6}

    monkeypatch.setattr(cpu_kernels, "median_seconds", median_seconds)
    (row,) = rows_of(cpu_kernels, tmp_path / "rows.json", monkeypatch)
    assert row == {
        **{"name": "x", "dtype": "fp32", "tokens": 7},
        "hot": {"ours_us": 2.0, "plain_us": 3.0, "ratio": 1.5},
        "cold": {"ours_us": 4.0, "plain_us": 10.0, "ratio": 2.5},
    }


@pytest.mark.parametrize(("options", "sets"), [([], 1), (["--cold"], 6)])
def test_rates_of_products(options: list[str], sets: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's, of 12 n d^2 multiply-adds; a millisecond for each set of weights."""
    monkeypatch.setattr(packing, "ROWS", (16,))
    monkeypatch.setattr(packing, "products", lambda rows, dtype, sets: {"panels": sets})
    monkeypatch.setattr(packing, "median_seconds", lambda field, repeats, warm_up: {"panels": 1e-3 * field["panels"]})
    (row,) = rows_of(packing, tmp_path / "rows.json", monkeypatch, *options)
    assert row["gflops_per_s"] == {"panels": round(2 * 12 * 16 * 768**2 / (1e-3 * sets) / 1e9, 1)}


def test_rows_are_written_with_the_environment(tmp_path: Path) -> None:
    single_runs.write(None, "title", [])
    single_runs.write(tmp_path / "rows.json", "title", [{"name": "a"}])
    document = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert list(document) == ["title", "environment", "rows"] and document["rows"] == [{"name": "a"}]
    assert document["environment"]["torch"] == torch.__version__
