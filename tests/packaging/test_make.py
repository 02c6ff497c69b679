"""What the Makefile decides: what is cleaned, what is built again, and what must not be passed over in silence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = "transkimmer_kernels/libtranskimmer_cpu.so"
STAMPS = (".venv/.python", ".venv/.dependencies", ".venv/.installed")
INSTALL = "pip --disable-pip-version-check -qq install --no-build-isolation -e ."

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make was not found")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile, and nothing to do: the environment is there and everything is installed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("csrc", "cmake"):
        (tmp_path / name).mkdir()
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "requirements-dev.txt"):
        (tmp_path / name).touch()
    _fill(tmp_path, *STAMPS, LIBRARY, "build/cmake/CMakeCache.txt")
    return tmp_path


def _fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def _make(folder: Path, *arguments: str, expect: int = 0, **variables: str) -> str:
    """What make prints; variables of an outer make and what would choose for it are not passed on."""
    ours = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "TORCH", "TRANSKIMMER_SKIP_NATIVE_BUILD")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | variables
    run = subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == expect, run.stdout + run.stderr
    return run.stdout + run.stderr


def test_clean_removes_what_a_build_made_and_no_trainings(checkout: Path) -> None:
    built = (LIBRARY, "build/cmake/CMakeCache.txt", "build/lib.linux-x86_64-cpython-311/transkimmer/x.py")
    built += ("build/temp.linux-x86_64-cpython-311/x.o", "build/bdist.linux-x86_64/x", "dist/x.whl")
    built += ("python/transkimmer.egg-info/PKG-INFO", "python/transkimmer/__pycache__/x.pyc", ".mypy_cache/x")
    kept = ("build/demo/dense/model.safetensors", ".benchmarks/accuracy/run/model.safetensors", ".venv/bin/python")
    _fill(checkout, *built, *kept, "csrc/x.cpp")
    _make(checkout, "clean")
    assert [name for name in built if (checkout / name).exists()] == []
    assert [name for name in (*kept, "csrc/x.cpp") if not (checkout / name).exists()] == []
    shutil.rmtree(checkout / "build/demo")
    _make(checkout, "clean")
    assert not (checkout / "build").exists()


def test_a_build_that_is_gone_is_made_again(checkout: Path) -> None:
    """The libraries alone do not do: the C++ self-checks stand beside them."""
    skip = "TRANSKIMMER_SKIP_NATIVE_BUILD=1"
    assert INSTALL not in _make(checkout, "-n", "setup")
    shutil.rmtree(checkout / "build")
    assert INSTALL in _make(checkout, "-n", "setup") and INSTALL not in _make(checkout, "-n", "setup", skip)
    _fill(checkout, "build/cmake/CMakeCache.txt")
    (checkout / LIBRARY).unlink()
    assert INSTALL in _make(checkout, "-n", "setup") and INSTALL not in _make(checkout, "-n", "setup", skip)


def test_self_checks_are_not_passed_over(checkout: Path) -> None:
    for name in ("cmake", "ctest"):
        path = checkout / ".venv/bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\necho ran {name} $*\n")
        path.chmod(0o755)
    ran = _make(checkout, "native-test")
    assert "ran cmake --build build/cmake --target native_tests" in ran and "ran ctest --test-dir build/cmake" in ran
    shutil.rmtree(checkout / "build")
    assert "build/cmake is missing" in _make(checkout, "native-test", expect=2)
    (checkout / LIBRARY).unlink()
    assert "libtranskimmer_cpu was not built" in _make(checkout, "native-test", expect=2)
    assert "native-test" in _make(checkout, "-n", "test")


def test_another_torch_is_installed(checkout: Path) -> None:
    (checkout / ".venv/.torch").write_text("torch==2.13.0\n")
    for given in ((), ("TORCH=torch==2.13.0",)):
        assert "install" not in _make(checkout, "-n", "setup", *given)
    assert "-qq install torch==2.12.0\n" in _make(checkout, "-n", "setup", "TORCH=torch==2.12.0")
    assert "-qq install torch==2.12.0\n" in _make(checkout, "-n", "setup", TORCH="torch==2.12.0")
    (checkout / ".venv/.torch").unlink()
    assert "-qq install torch==2.13.0\n" in _make(checkout, "-n", "setup", "TORCH=torch==2.13.0")


def test_another_python_is_refused(checkout: Path) -> None:
    here = checkout / ".venv/bin/python"
    here.parent.mkdir(exist_ok=True)
    here.symlink_to(sys.executable)
    assert _make(checkout, "setup") == ""
    _make(checkout, "setup", f"PYTHON={sys.executable}")
    here.unlink()
    here.write_text("#!/bin/sh\necho another\n")
    here.chmod(0o755)
    _make(checkout, "setup")
    for error in (
        _make(checkout, "setup", f"PYTHON={sys.executable}", expect=2),
        _make(checkout, "setup", PYTHON=sys.executable, expect=2),
    ):
        assert f"PYTHON={sys.executable}: .venv is of another Python" in error and "rm -rf .venv" in error
