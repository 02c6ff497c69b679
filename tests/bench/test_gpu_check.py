"""`make gpu-check` where no GPU is: which steps there are, what it reads from them, and what it reports."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.gpu_check import each_operator, machine, readings, report, runner
from benchmarks.gpu_check.readings import Reading
from benchmarks.gpu_check.steps import Step, backends_to_require, environment_step, steps

from .test_containment import NO_PLUGINS

ROOT = Path(__file__).parents[2]
GPU = "NVIDIA H200, sm_90, 140 GiB"
FACTS = {"date": "2026-01-01T00:00:00+00:00", "commit": "c0ffee", "versions": {"torch": "2.11.0"}}
FACTS["device"] = {"name": "NVIDIA H200", "description": GPU, "driver": "580", "max_sm_clock": "", "memory": ""}


def environment(gpu: Any = (GPU,), **backends: str) -> dict[str, Any]:
    row = {"reference": "available", "cpu": "no", "triton": "available", "cuda": "available", **backends}
    return {
        "machine": {"gpu": list(gpu) if isinstance(gpu, tuple) else gpu, "torch_cuda": "13.0"},
        "versions": {"torch": "2.11.0"},
        "operators": {"compact": row},
    }


# One step


def _step(code: str, **options: Any) -> Step:
    return Step("try", "a purpose", (sys.executable, "-c", code), 60, **options)


def test_a_step_that_passes_and_one_that_fails(tmp_path: Path) -> None:
    log = tmp_path / "all.log"
    passed, _ = runner.run_step(_step("print('fine')"), 60, log)
    failed, _ = runner.run_step(_step("print('bad'); raise SystemExit(1)"), 60, log)
    assert (passed.status, passed.reason, passed.log_tail) == ("passed", "", "")
    assert (failed.status, failed.reason, failed.log_tail) == ("failed", "exit status 1", "bad")
    assert "fine" in log.read_text() and "bad" in log.read_text()


@pytest.mark.parametrize(
    ("reading", "code", "status", "reason"),
    [
        (Reading(problem="two are wrong"), 0, "failed", "two are wrong"),
        (Reading(problem="two are wrong"), 1, "failed", "exit status 1; two are wrong"),
        (Reading(skipped="nothing to do"), 0, "skipped", "nothing to do"),
        (Reading(skipped="nothing to do"), 1, "failed", "exit status 1"),
        (Reading(skipped="not on this device", excuses_exit=True), 1, "skipped", "not on this device"),
    ],
)
def test_status(reading: Reading, code: int, status: str, reason: str, tmp_path: Path) -> None:
    step = _step(f"raise SystemExit({code})", read=lambda folder, log: reading)
    result, _ = runner.run_step(step, 60, tmp_path / "log")
    assert (result.status, result.reason) == (status, reason)


def test_a_broken_file_of_results_fails_its_step_only(tmp_path: Path) -> None:
    code = "import pathlib, sys; pathlib.Path('{folder}/junit.xml').write_text('<testsuite')"
    result, _ = runner.run_step(_step(code, read=readings.junit), 60, tmp_path / "log")
    assert result.status == "failed"
    assert result.reason.startswith("its results cannot be read: ParseError")


def test_a_step_finds_the_checkout_wherever_it_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("transkimmer", "transkimmer_kernels")
    code = f"import importlib.util as u; print(*[u.find_spec(name).origin for name in {names}], sep='\\n')"
    log = tmp_path / "log"
    step = dataclasses.replace(_step(code), command=(sys.executable, "-S", "-c", code))  # -S: nothing is installed
    result, _ = runner.run_step(step, 60, log)
    assert result.status == "passed", result.log_tail
    assert log.read_text().split()[-2:] == [
        str(ROOT / folder / "__init__.py") for folder in ("python/transkimmer", "transkimmer_kernels")
    ]


# Readings

SOME_TESTS = """
import pytest
def test_passes(): pass
@pytest.mark.parametrize("n", range(3))
def test_skips(n): pytest.skip("no kernel for it")
"""
FAILS = "def test_fails(): assert 1 + 1 == 3, 'sums are off'\n"
ONLY_SKIPS = "import pytest\npytestmark = pytest.mark.skip('no device')\ndef test_it(): pass\n"


def _pytest(source: str, tmp_path: Path, *options: str) -> Reading:
    (tmp_path / "test_some.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={tmp_path}/junit.xml"]
    # Not as one of the processes that these tests may be spread over: pytest-benchmark would measure nothing.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    if "benchmark" not in source:
        variables |= NO_PLUGINS
    subprocess.run([*command, *options, "test_some.py"], cwd=tmp_path, check=False, capture_output=True, env=variables)
    return readings.junit(tmp_path, "")


def test_reading_of_tests(tmp_path: Path) -> None:
    good = _pytest(SOME_TESTS, tmp_path)
    assert good.details == {"passed": 1, "failed": [], "skipped": {"no kernel for it": 3}}
    assert (good.problem, good.skipped, good.note) == ("", "", "1 passed, 0 failed, 3 skipped")
    bad = _pytest(SOME_TESTS + FAILS, tmp_path)
    assert bad.problem == "1 failed, first test_some.test_fails"
    assert "sums are off" in bad.details["failed"][0]["message"]
    assert _pytest("import nowhere", tmp_path).problem.startswith("1 failed")
    assert _pytest(ONLY_SKIPS, tmp_path).skipped == "no device"
    assert _pytest(SOME_TESTS, tmp_path, "-k", "nothing").problem == "no test was selected"


def test_a_stopped_run_has_no_results(tmp_path: Path) -> None:
    assert readings.junit(tmp_path, "").problem == "pytest left no results"
    assert readings.benchmark(tmp_path, "").problem == "pytest left no results"
    assert readings.environment(tmp_path, "").problem == "there is no report"


TIMED = """
import pytest
@pytest.mark.parametrize("contender", ["triton", "eager"])
def test_it(benchmark, contender):
    benchmark.group = "skim_logit forward x"
    benchmark.extra_info.update(
        operator="skim_logit", variant="forward", workload="x", state="full", contender=contender,
        ours=contender == "triton", calls=4, bound_us=1e-3,
    )
    benchmark.pedantic(lambda: sum(range(100)), rounds=3)
"""


def test_reading_of_figures(tmp_path: Path) -> None:
    """From pytest-benchmark itself: a figure is the time of one call out of the four in a round."""
    _pytest(TIMED, tmp_path, f"--benchmark-json={tmp_path}/benchmark.json")
    reading = readings.benchmark(tmp_path, "")
    raw = json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"]
    assert (reading.problem, len(reading.figures)) == ("", 2)
    for figure, row in zip(reading.figures, raw, strict=True):
        assert figure["median_us"] == pytest.approx(row["stats"]["median"] * 1e6 / 4)
        assert figure["roofline_share"] == pytest.approx(1e-3 / figure["median_us"])
        assert figure["contender"] in ("triton", "eager") and figure["rounds"] == 3
    found = {row["aim"]: row for row in report.summary(reading.figures)}["skim_logit over eager PyTorch"]
    ratio = reading.figures[1]["median_us"] / reading.figures[0]["median_us"]
    assert found["geometric_mean"] == pytest.approx(ratio) and found["backend"] == "triton"


@pytest.mark.parametrize(
    ("log", "problem", "skipped"),
    [
        ("...\n========= ERROR SUMMARY: 0 errors\n", "", ""),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "", ""),
        ("========= Error: Device not supported", "", "compute-sanitizer does not support this device"),
        ("Segmentation fault", "compute-sanitizer gave no summary", ""),
    ],
)
def test_reading_of_the_sanitizer(log: str, problem: str, skipped: str, tmp_path: Path) -> None:
    reading = readings.sanitizer(tmp_path, log)
    assert reading.problem == problem
    assert reading.skipped.startswith(skipped) and bool(reading.skipped) == bool(skipped)


# Which steps there are


def test_without_a_device_every_step_says_why() -> None:
    for step in steps(environment("none visible to torch")):
        assert step.reason == "no GPU: none visible to torch"
    for step in steps(None):
        assert step.reason == "the environment report could not be made"


def test_with_a_device_every_step_runs_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = {step.name: step.reason for step in steps(environment())}
    lacking = "compute-sanitizer was not found"
    assert {name for name, reason in found.items() if reason} == {"memcheck", "racecheck"}
    assert found["memcheck"] == found["racecheck"] == lacking
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert not any(step.reason for step in steps(environment()))


def test_the_steps_name_files_that_exist() -> None:
    for step in steps(environment()):
        files = [part for part in step.command if part.startswith(("tests/", "benchmarks/"))]
        assert all((ROOT / file).exists() for file in files)
    names = [step.name for step in steps(environment())]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("backends", "required"),
    [({}, ["triton", "cuda"]), ({"cuda": "not built"}, ["triton"]), ({"triton": "no triton kernel"}, ["cuda"])],
)
def test_what_is_there_is_required(backends: dict[str, str], required: list[str]) -> None:
    report_of = environment(**backends)
    assert backends_to_require(report_of) == required
    wanted = {step.name: step.environment.get("TRANSKIMMER_REQUIRE_BACKENDS") for step in steps(report_of)}
    assert wanted["conformance"] == ",".join(required)
    assert wanted["sync"] == (wanted["conformance"] if "triton" in required else "")


def test_the_environment_step(tmp_path: Path) -> None:
    result, reading = runner.run_step(environment_step(), 120, tmp_path / "log")
    assert result.status == "passed", result.log_tail
    assert {"machine", "operators", "versions"} <= set(reading.details)
    assert machine.facts(reading.details)["versions"]["torch"]


def test_the_commit_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_CHECK_COMMIT", "c0ffee")
    assert machine.commit() == "c0ffee"


# The whole, and its report


def _fake_steps(monkeypatch: pytest.MonkeyPatch, *of: Step, gpu: Any = (GPU,)) -> None:
    known = environment(gpu)
    first = _named("environment", read=lambda folder, log: Reading(known))
    monkeypatch.setattr(runner, "environment_step", lambda: first)
    monkeypatch.setattr(runner, "steps", lambda report_of: list(of))
    monkeypatch.setattr(machine, "device", lambda report_of: FACTS["device"] if isinstance(gpu, tuple) else None)


def _named(name: str, code: str = "pass", **options: Any) -> Step:
    return Step(name, "a purpose", (sys.executable, "-c", code), options.pop("limit_s", 60), **options)


def test_a_bad_step_stops_none_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_steps(
        monkeypatch,
        _named("crash", "import os; os.abort()"),
        _named("hang", "import time; time.sleep(60)", limit_s=1),
        _named("unable", reason="a tool was not found"),
        _named("last", "print('reached')"),
    )
    data = runner.check(tmp_path, 5)
    found = {step["name"]: (step["status"], step["reason"]) for step in data["steps"][1:]}
    assert re.fullmatch(r"stopped at its limit, after \d+ s", found["hang"][1])
    assert found == {
        "crash": ("failed", "killed by SIGABRT"),
        "hang": ("failed", found["hang"][1]),
        "unable": ("skipped", "a tool was not found"),
        "last": ("passed", ""),
    }
    assert json.loads((tmp_path / "gpu-check.json").read_text()) == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-check.json", "gpu-check.log"]
    assert "reached" in (tmp_path / "gpu-check.log").read_text()


def test_steps_that_take_no_times_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two waits for the other; the one behind them, which takes times, for both."""
    files = [tmp_path / name for name in "ab"]
    wait = "import pathlib, time; pathlib.Path({!r}).touch()\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.02)"
    both = [_named(mine.name, wait.format(str(mine), str(other))) for mine, other in (files, files[::-1])]
    gone = f"import pathlib; assert all(pathlib.Path(f).exists() for f in {list(map(str, files))!r})"
    _fake_steps(monkeypatch, *both, _named("times", gone, alone=True))
    data = runner.check(tmp_path / "out", 1)
    assert [(step["name"], step["status"]) for step in data["steps"][1:]] == [
        (n, "passed") for n in ("a", "b", "times")
    ]


def test_the_time_for_everything_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_steps(monkeypatch, _named("long"), _named("late", alone=True))
    now, limits = [100.0], {}

    def run_steps(todo: Sequence[tuple[Step, float]], log: Path) -> Iterator[tuple[report.StepResult, Reading]]:
        """Each of them takes as long as it may, but for the first one: two seconds."""
        for step, limit_s in todo:
            limits[step.name] = limit_s
            now[0] += 2 if step.name == "environment" else limit_s
            yield dataclasses.replace(runner.skipped(step, ""), status="passed"), step.read(tmp_path, "")

    monkeypatch.setattr(runner, "run_steps", run_steps)
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: now[0]))
    data = runner.check(tmp_path, 0.5)
    assert limits == {"environment": 60, "long": 28}
    assert [step["status"] for step in data["steps"]] == ["passed", "passed", "skipped"]
    assert data["steps"][2]["reason"] == "no time was left of 0.5 minutes"


@pytest.mark.parametrize(
    ("code", "gpu", "options", "status"),
    [
        ("pass", (GPU,), ["--only", "one"], 0),
        ("pass", (GPU,), ["--only", "environment"], 0),
        ("pass", (GPU,), [], 3),  # no aim was measured
        ("raise SystemExit(1)", (GPU,), [], 1),
        ("pass", "none", ["--only", "environment"], 0),
        ("pass", "none", [], 1),
        ("pass", "none", ["--allow-no-gpu"], 0),
        ("raise SystemExit(1)", "none", ["--allow-no-gpu"], 1),
        ("pass", (GPU,), ["--only", "nowhere"], 2),
    ],
)
def test_exit_status(
    code: str, gpu: Any, options: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu_check.__main__ import main

    monkeypatch.setattr("signal.signal", lambda *_: None)
    _fake_steps(monkeypatch, _named("one", code), _named("two", code), gpu=gpu)
    assert main(["--out", str(tmp_path), *options]) == status


def _figure(contender: str, median_us: float, **facts: Any) -> dict[str, Any]:
    row = {"operator": "ragged_attention", "variant": "forward", "state": "skimmed", "group": "g"}
    return {**row, "contender": contender, "ours": contender in ("triton", "cuda"), "median_us": median_us, **facts}


def test_summary_compares_on_the_same_problem_only() -> None:
    figures = [
        *(_figure("triton", 2.0, group=group) for group in "abc"),
        _figure("cuda", 1.0, group="a"),
        _figure("varlen_attn", 4.0, group="a"),
        _figure("varlen_attn", 9.0, group="b"),  # nobody was there to be compared with in c
        _figure("varlen_attn", 99.0, group="a", state="full"),
    ]
    rows = {(row["aim"], row["backend"]): row for row in report.summary(figures)}
    name = "attention, skimmed lengths, over varlen_attn"
    triton = rows[name, "triton"]
    assert (triton["problems"], triton["smallest"], triton["largest"]) == (2, 2.0, 4.5)
    assert triton["geometric_mean"] == pytest.approx(3.0)
    assert (rows[name, "cuda"]["problems"], rows[name, "cuda"]["smallest"]) == (1, 4.0)
    assert triton["met"] is True and rows["compact at 64k tokens, in microseconds", None]["met"] is None
    assert rows["compact at 64k tokens, in microseconds", None]["geometric_mean"] is None


def test_a_fused_product_is_compared_with_its_own_parts() -> None:
    facts = {"operator": "ragged_linear", "variant": "gelu"}
    figures = [_figure(*row, **facts) for row in (("triton", 2.0), ("unfused_triton", 3.0), ("unfused_cublas", 8.0))]
    (row,) = [row for row in report.summary(figures) if row["problems"]]
    assert (row["aim"], row["geometric_mean"]) == ("fused product over unfused", pytest.approx(1.5))


STEP_TYPES = {"name": str, "purpose": str, "status": str, "reason": str, "note": str, "log_tail": str}
STEP_TYPES |= {"seconds": float, "limit_s": (int, float), "command": list, "details": dict}


def test_the_document_has_its_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_steps(monkeypatch, _named("one"), _named("two", reason="no"))
    data = runner.check(tmp_path, 5)
    keys = ["schema", "date", "commit", "device", "versions", "summary", "steps", "figures", "environment"]
    assert list(data) == keys and data["schema"] == report.SCHEMA
    for step in data["steps"]:
        assert set(step) == set(STEP_TYPES)
        assert all(isinstance(value, STEP_TYPES[key]) for key, value in step.items())
        assert step["status"] in report.STATUSES
        assert bool(step["reason"]) == (step["status"] != "passed")
    assert [row["problems"] for row in data["summary"]] == [0] * len(report.AIMS)


def test_the_table_comes_last_and_claims_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    step = report.StepResult("one", "", "skipped", "no GPU", "", 0.0, 1.0, [], {}, "")
    report.show(report.document(FACTS, None, [step], []), Console(width=120))
    out = capsys.readouterr().out
    assert "gpu-check on NVIDIA H200, driver 580" in out and "no GPU" in out
    assert out.count("not measured") == len(report.AIMS)


def test_make_gpu_check_needs_no_setup(tmp_path: Path) -> None:
    """By an interpreter that is named, from a checkout that nobody installed, and with a bad status without a GPU."""
    if shutil.which("make") is None or torch.cuda.is_available():
        pytest.skip("no make, or a GPU")
    command = ["make", "--no-print-directory", "gpu-check", f"PYTHON={sys.executable}", f"ARGS=--out {tmp_path}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode, run.stdout
    assert run.stdout.rstrip().endswith("there is no GPU here: nothing was shown about one")
    data = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [step["status"] for step in data["steps"]] == ["passed", *["skipped"] * (len(data["steps"]) - 1)]


# What the steps run


def test_every_operator_stands_in_the_sanitizers_set() -> None:
    from tests.ops.operators import SPECS

    assert {case.operator for case in each_operator.chosen_cases()} == set(SPECS)


def test_the_sanitizers_program_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["each_operator", "--device", "cpu", "--backends", "reference", "cuda"])
    each_operator.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(": ran") for line in lines) == len(each_operator.chosen_cases())
    assert any("cuda" in line and "not run" in line for line in lines)
