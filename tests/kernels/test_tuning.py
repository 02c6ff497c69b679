"""Configurations from files: which one is found, what a bad file costs, and how the best one is measured.

No file that is shipped is written here, and no time in this file was measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from transkimmer_kernels import triton_support, tuning
from transkimmer_kernels.tuning import Tunable

if (REASON := triton_support.why_not_importable()) is not None:
    pytest.skip(REASON, allow_module_level=True)

from transkimmer_kernels.tune import __main__ as command
from transkimmer_kernels.tune import compiling
from transkimmer_kernels.tune.problems import PROBLEMS, Problem, tunables
from transkimmer_kernels.tune.search import search

DEVICE = torch.device("cuda", 0)
BF16 = torch.bfloat16


class Tile(NamedTuple):
    shape: tuple[int, int] = (64, 64)
    share: float = 0.5
    num_warps: int = 4
    strategy: str = "triton"


TILE = Tunable("tried", lambda dtype, *sizes: Tile(), lambda dtype, *sizes: [Tile(num_warps=n) for n in (1, 2, 4, 8)])
TUNED = {"shape": [128, 32], "share": 1, "num_warps": 8, "strategy": "capacity"}


def document(config: Any, key: str = "bf16 64 32", **changes: Any) -> str:
    """A file as `python -m transkimmer_kernels.tune` writes it."""
    entry = {"config": config, "us": [], "default_us": [], "tried": 0, "complete": False, "dropped": {}}
    return json.dumps({"format": tuning.FORMAT, "device": "none", "operators": {"tried": {key: entry}}, **changes})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """TRANSKIMMER_CONFIGS, on a machine with an H200."""
    monkeypatch.setenv("TRANSKIMMER_CONFIGS", str(tmp_path))
    monkeypatch.setattr(tuning, "file_names", lambda device: ("nvidia_h200.json", "sm_90.json"))
    tuning.forget()
    yield tmp_path
    tuning.forget()


# Which configuration is found


def test_without_a_file_the_default(folder: Path) -> None:
    assert TILE.config(DEVICE, BF16, 64, 32) == Tile()


def test_a_measured_one(folder: Path) -> None:
    (folder / "nvidia_h200.json").write_text(document(TUNED))
    assert TILE.config(DEVICE, BF16, 64, 32) == Tile((128, 32), 1.0, 8, "capacity")
    assert TILE.config(DEVICE, BF16, 64, 33) == Tile()
    assert TILE.config(DEVICE, torch.float16, 64, 32) == Tile()


def test_the_device_goes_before_its_kind_and_own_files_before_packaged(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = tmp_path_factory.mktemp("packaged")
    monkeypatch.setattr(tuning, "PACKAGED", packaged)
    found = []
    for number, path in enumerate(
        (packaged / "sm_90.json", packaged / "nvidia_h200.json", folder / "sm_90.json", folder / "nvidia_h200.json")
    ):
        path.write_text(document(TUNED | {"num_warps": number + 1}))
        tuning.forget()
        found.append(TILE.config(DEVICE, BF16, 64, 32).num_warps)
    assert found == [1, 2, 3, 4]
    (folder / "nvidia_h200.json").write_text(document(TUNED, key="bf16 1 1"))  # knows other classes only
    tuning.forget()
    assert TILE.config(DEVICE, BF16, 64, 32).num_warps == 3


def test_names_of_files() -> None:
    assert tuning.slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
    assert tuning.slug("NVIDIA GeForce RTX 4090 (Laptop)") == "nvidia_geforce_rtx_4090_laptop"
    assert tuning.file_names(torch.device("cpu")) == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "nvidia_h200.json: .*; the defaults are used"),
        ("[]", "the defaults are used"),
        ('{"format": 1}', "'operators'"),
        (document(TUNED, format=99), "format 99, expected 1"),
        (document({"num_warps": 8}), "tried, bf16 64 32: expected the fields shape, share, .*, got num_warps"),
        (document(TUNED | {"num_warps": "8"}), "num_warps: expected something like 4, got '8'"),
        (document(TUNED | {"num_warps": True}), "num_warps: expected something like 4, got True"),
        (document(TUNED | {"share": True}), "share: expected something like 0.5, got True"),
        (document(TUNED | {"shape": [1]}), r"shape: expected something like \(64, 64\), got \[1\]"),
        (document(None), "the default is used"),
    ],
)
def test_a_bad_file_is_passed_over_with_one_warning(content: str, message: str, folder: Path) -> None:
    (folder / "nvidia_h200.json").write_text(content)
    (folder / "sm_90.json").write_text(document(TUNED | {"num_warps": 2}))
    with pytest.warns(UserWarning, match=message):
        found = TILE.config(DEVICE, BF16, 64, 32)
    assert found in (Tile(), Tile((128, 32), 1.0, 2, "capacity"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TILE.config(DEVICE, BF16, 64, 32) == found


def test_a_launch_asks_a_dictionary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nvidia_h200.json").write_text(document(TUNED))
    TILE.config(DEVICE, BF16, 64, 32)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_read", lambda path: pytest.fail("read a file"))
        assert TILE.config(DEVICE, BF16, 64, 32).num_warps == 8


def test_forced(folder: Path) -> None:
    with tuning.forced("tried", Tile(num_warps=1)):
        assert TILE.config(DEVICE, BF16, 64, 32).num_warps == 1
    assert TILE.config(DEVICE, BF16, 64, 32) == Tile()


def test_shipped_configurations_are_those_of_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "PACKAGED", folder)
    monkeypatch.delenv("TRANSKIMMER_CONFIGS")
    assert TILE.shipped(BF16, 64, 32) == {Tile(): None}
    for name, warps, capability in (("a", 8, "sm_90"), ("b", 2, "sm_80"), ("c", 8, "sm_100")):
        (folder / f"{name}.json").write_text(document(TUNED | {"num_warps": warps}, capability=capability))
    tuning.forget()
    shipped = TILE.shipped(BF16, 64, 32)
    assert {tile.num_warps: target for tile, target in shipped.items()} == {4: None, 8: "sm_90", 2: "sm_80"}


# What the operators expose


@pytest.mark.parametrize("operator", tunables())
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_configurations_survive_a_file(operator: str, dtype: torch.dtype) -> None:
    tunable = tunables()[operator]
    for sizes in PROBLEMS[operator].sizes:
        default = tunable.default(dtype, *sizes)
        candidates = set(tunable.candidates(dtype, *sizes))
        assert 3 <= len(candidates) <= 64
        for config in (default, *candidates):
            assert tunable.decode(json.loads(json.dumps(config._asdict())), dtype, *sizes) == config


def test_every_tunable_operator_has_a_problem() -> None:
    assert {"ragged_linear", "skim_logit"} <= set(tunables()) <= set(PROBLEMS)


@pytest.mark.parametrize("operator", PROBLEMS)
def test_problems_are_what_the_operators_take(operator: str) -> None:
    """By the reference, in two dtypes; `rows` are the rows that count."""
    sizes = tuple(min(size, 64) for size in PROBLEMS[operator].sizes[0])
    for capacity, count in ((64, 64), (64, 21), (64, 1)):
        call = PROBLEMS[operator].make(BF16, sizes, (capacity, count), torch.device("cpu"))
        exact, plain = call("reference", torch.float64), call("reference", BF16)
        assert exact.dtype == torch.float64 and exact.size(0) == plain.size(0) == count
        assert exact.isfinite().all() and exact.norm() > 0.1
        assert (exact - plain).abs().max() < 0.1


def test_packaged_files_fit_the_kernels() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in tuning.PACKAGED.glob("*.json"):
            for operator, entries in tuning._read(path).items():
                for key, entry in entries.items():
                    dtype, *sizes = key.split()
                    kinds = {name: kind for kind, name in triton_support.DTYPE_NAMES.items()}
                    tunables()[operator].decode(entry["config"], kinds[dtype], *map(int, sizes))
                    assert min(entry["us"]) > 0


# How the best one is measured

GOOD = torch.linspace(1, 2, 64, dtype=torch.float64)


class Trial(NamedTuple):
    us: float
    does: str = "right"


def _call(kernels: str, dtype: torch.dtype) -> Tensor:
    if kernels == "reference":
        return GOOD.to(dtype)
    does = tuning._forced["tried"].does
    if does == "raises":
        raise RuntimeError("out of resources: shared memory\nand a long story")
    if does == "wrong":
        return (GOOD * 1.1).to(dtype)
    return torch.full_like(GOOD, torch.nan) if does == "nan" else GOOD.to(dtype)


def _search(*trials: Trial, **options: Any) -> Any:
    tunable = Tunable("tried", lambda *_: Trial(10.0), lambda *_: trials)

    def seconds(run: Any) -> float:
        run()
        return tuning._forced["tried"].us / 1e6

    return search(tunable, BF16, (1,), [_call, _call], seconds, **options)


def test_the_fastest_right_one_is_found_and_the_others_noted() -> None:
    bad = [Trial(1.0, "raises"), Trial(1.0, "wrong"), Trial(1.0, "nan")]
    found = _search(*bad, Trial(12.0), Trial(5.0), Trial(7.0), Trial(10.0))
    assert (found.config, found.times, found.default_times) == (Trial(5.0), [5.0, 5.0], [10.0, 10.0])
    assert (found.tried, found.complete) == (7, True)  # the default stood among the candidates again
    reasons = list(found.dropped.values())
    assert reasons[0] == "RuntimeError: out of resources: shared memory"
    assert all("wrong result: off by" in reason for reason in reasons[1:])
    assert tuning._forced == {}


def test_the_best_changes_of_different_fields_are_tried_together() -> None:
    """The wider of two tiles and the fewer of two warps; what is worse than the default, or as good, is left out."""
    shapes, default = {(64, 64): 10.0, (128, 32): 6.0, (32, 32): 8.0}, Tile()
    trials = [default._replace(shape=shape) for shape in shapes] + [default._replace(num_warps=n) for n in (2, 8)]
    trials += [default._replace(share=default.share / 2)]
    tunable = Tunable("tried", lambda *_: default, lambda *_: trials)

    def microseconds() -> float:
        config = tuning._forced["tried"]
        return shapes[config.shape] * {2: 0.5, 4: 1.0, 8: 2.0}[config.num_warps]

    right = lambda kernels, dtype: GOOD.to(dtype)  # noqa: E731
    found = search(tunable, BF16, (1,), [right], lambda run: (run(), microseconds() / 1e6)[1])
    assert (found.config, found.times) == (default._replace(shape=(128, 32), num_warps=2), [3.0])
    assert found.tried == 1 + 5 + 1


def test_what_is_hardly_faster_is_not_taken() -> None:
    assert _search(Trial(9.9)).config == Trial(10.0)


def test_a_search_ends_in_time_and_says_so() -> None:
    found = _search(Trial(5.0), deadline=0.0)
    assert (found.config, found.complete, found.tried) == (Trial(10.0), False, 1)


def test_a_default_that_is_wrong_is_an_error() -> None:
    tunable = Tunable("tried", lambda *_: Trial(1.0, "wrong"), lambda *_: [])
    with pytest.raises(ValueError, match="wrong result"):
        search(tunable, BF16, (1,), [_call], lambda run: 1.0)


# The command


def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = subprocess.run(
        [sys.executable, "-m", "transkimmer_kernels.tune", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.strip() == "tune: torch sees no CUDA device; nothing was measured and nothing was written"
    assert not list(tmp_path.iterdir())


def test_a_run_writes_what_a_launch_then_finds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an imagined device: what is in the file before stays, and one class is replaced."""
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(command, "why_not", lambda: None)
    monkeypatch.setattr(command, "seconds", lambda run: tuning._forced["tried"].num_warps / 1e6)
    monkeypatch.setattr(command, "tunables", lambda: {"tried": TILE})
    problem = Problem(((64, 32),), lambda dtype, sizes, rows, device: lambda kernels, dtype: GOOD.to(dtype))
    monkeypatch.setattr(command, "PROBLEMS", {"tried": problem})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "compile_candidates", lambda *_: None)
    path = folder / "nvidia_h200.json"
    path.write_text(document(TUNED, key="bf16 1 1"))
    assert command.main(["--out", str(folder), "--operators", "tried"]) == 0
    written = json.loads(path.read_text())
    assert set(written["operators"]["tried"]) == {"bf16 1 1", "bf16 64 32"}
    assert (written["device"], written["capability"]) == ("NVIDIA H200", "sm_90")
    assert [item.name for item in folder.iterdir()] == ["nvidia_h200.json"]
    tuning.forget()
    assert TILE.config(DEVICE, BF16, 64, 32) == Tile(num_warps=1)


def test_compiling_beforehand_covers_every_candidate_and_forgives(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Pool:
        def submit(self, run: Any, *arguments: Any) -> Future[None]:
            asked.append(arguments)
            future: Future[None] = Future()
            future.set_exception(RuntimeError("does not compile"))
            return future

    compiling.compile_candidates(Pool(), TILE, BF16, (64, 32), float("inf"))
    assert [arguments[3]["num_warps"] for arguments in asked] == [1, 2, 4, 8]
    ran = []
    monkeypatch.setattr(compiling, "tunables", lambda: {"tried": TILE})
    call = lambda kernels, dtype: ran.append((kernels, dtype, tuning._forced["tried"]))  # noqa: E731
    monkeypatch.setattr(compiling, "PROBLEMS", {"tried": Problem(((64, 32),), lambda *_: call)})
    compiling.compile_one(*asked[3][:4], "cpu")
    assert ran == [("triton", BF16, Tile(num_warps=8))]
