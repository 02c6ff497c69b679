"""What is made of a checkout without torch: the name, the version and an sdist that the native build can start from."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transkimmer

from .test_packaging import HIDE_TORCH, ROOT, SETUP, _python

NATIVE = ("csrc", "cmake")
PACKAGES = ("python", "transkimmer_kernels")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE")
# Of a package, what is made from it and no part of it.
MADE = ("__pycache__", "*.egg-info", "*.so", "*.dylib")


def test_the_version_is_the_packages_and_needs_no_torch() -> None:
    out, _ = _python(f"{HIDE_TORCH}{SETUP.replace('--name', '--version')}; assert 'torch' not in sys.modules")
    assert out.split()[-1] == transkimmer.__version__


def test_an_sdist_holds_what_a_build_needs_and_is_made_without_torch(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in (*NATIVE, *PACKAGES):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*MADE))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    (source / "transkimmer_kernels/libtranskimmer_cpu.so").write_text("of another machine")
    code = HIDE_TORCH + SETUP.replace("'--name'", "'-q', 'sdist'")
    run = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    (archive,) = (source / "dist").glob(f"transkimmer-{transkimmer.__version__}.tar.gz")
    with tarfile.open(archive) as file:
        names = {member.name.partition("/")[2] for member in file if member.isfile()}
    wanted = {str(path.relative_to(ROOT)) for name in NATIVE for path in (ROOT / name).rglob("*") if path.is_file()}
    wanted |= {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    wanted |= {*FILES, "python/transkimmer/py.typed", "python/transkimmer/demo/model.safetensors"}
    assert sorted(wanted - names) == []
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_parts_of_the_package_are_there_when_they_are_asked_for() -> None:
    """As the README writes them; and to import the package does not import what only training needs."""
    out, _ = _python(
        "import sys, transkimmer\n"
        "assert {'training', 'flops', 'SkimConfig'} <= set(dir(transkimmer))\n"
        "print([name for name in ('transformers.trainer', 'transkimmer.training') if name in sys.modules])\n"
        "transkimmer.training.calibrate, transkimmer.training.SkimTrainer, transkimmer.flops.EncoderShape\n"
        "try:\n    transkimmer.nonsense\nexcept AttributeError as error:\n    print(error)\n"
    )
    assert out.splitlines() == ["[]", "module 'transkimmer' has no attribute 'nonsense'"]
