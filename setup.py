"""Finds torch and nvcc and drives CMake with ninja; everything else is in pyproject.toml and CMakeLists.txt.

The environment variables that change what is built are described in docs/building.md.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
COMMAND = "pip install --no-build-isolation ."


def env_flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "off", "false")


def find_tool(*names: str) -> str | None:
    """The first of `names` beside this interpreter (cmake and ninja from PyPI) or on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def find_compiler() -> str | None:
    wanted = os.environ.get("CXX")
    return find_tool(shlex.split(wanted)[0]) if wanted else find_tool("c++", "g++", "clang++")


def find_nvcc() -> str | None:
    """What is asked for, CUDACXX before CUDA_HOME and CUDA_PATH; where nothing is, PATH's before /usr/local/cuda's."""
    if wanted := os.environ.get("CUDACXX"):
        return find_tool(shlex.split(wanted)[0])
    homes = filter(None, map(os.environ.get, ("CUDA_HOME", "CUDA_PATH")))
    return find_tool(*(str(Path(home, "bin/nvcc")) for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc")


def find_torch() -> Path | None:
    """Folder of the torch package; not imported, since only its headers and one library are needed."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def require_torch() -> None:
    """Where native code is to be built, and not at the end of this file: an sdist is made without torch."""
    if why_not_native() is None and find_torch() is None:
        sys.exit(f"transkimmer: torch is not importable here; install torch>=2.10 first, then run: {COMMAND}")


def why_not_native() -> str | None:
    """None when native code is to be built, else the reason for a pure-Python install."""
    if env_flag("TRANSKIMMER_SKIP_NATIVE_BUILD"):
        return "TRANSKIMMER_SKIP_NATIVE_BUILD is set"
    tools = {
        "a C++ compiler": find_compiler(),
        "cmake": find_tool("cmake"),
        "ninja": find_tool("ninja", "ninja-build"),
    }
    missing = [name for name, path in tools.items() if path is None]
    return f"{' and '.join(missing)} not found" if missing else None


class FreshBuild(build):
    """Starts from an empty folder: a module deleted since the last build must not get into the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """One CMake project builds all native files, which go beside the Python files of transkimmer_kernels."""

    def run(self) -> None:
        require_torch()
        package = "transkimmer_kernels"
        destination = ROOT / package if self.inplace else Path(self.build_lib).resolve() / package
        folder = ROOT / "build" / "cmake"
        cmake, jobs = find_tool("cmake"), os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        # CMake does not follow a checkout that has moved or a compiler that has changed: then start over.
        toolchain, stamp = f"{ROOT}\n{cmake}\n{find_compiler()}\n{find_nvcc()}\n", folder / "toolchain.txt"
        if folder.exists() and not (stamp.exists() and stamp.read_text() == toolchain):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(toolchain)
        try:
            subprocess.run([cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *self.definitions()], check=True)
            subprocess.run([cmake, "--build", folder, "--parallel", jobs], check=True)
            subprocess.run([cmake, "--install", folder, "--prefix", destination], check=True)
        except subprocess.CalledProcessError:
            sys.exit(
                "transkimmer: the native build failed (compiler messages above). "
                f"To install without native kernels: TRANSKIMMER_SKIP_NATIVE_BUILD=1 {COMMAND}"
            )

    def definitions(self) -> list[str]:
        python = sysconfig.get_path("include")
        nvcc, reason = find_nvcc(), f"{os.environ.get('CUDACXX') or 'nvcc'} was not found"
        if env_flag("TRANSKIMMER_SKIP_CUDA_BUILD"):
            nvcc, reason = None, "TRANSKIMMER_SKIP_CUDA_BUILD was set"
        return [
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'ninja-build')}",
            f"-DTRANSKIMMER_TORCH_DIR={find_torch()}",
            f"-DTRANSKIMMER_VERSION={self.distribution.get_version()}",
            f"-DTRANSKIMMER_PYTHON_INCLUDE={python if Path(python, 'Python.h').exists() else ''}",
            f"-DTRANSKIMMER_PYTHON_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            f"-DTRANSKIMMER_NVCC={nvcc or ''}",
            f"-DTRANSKIMMER_NO_CUDA_REASON={reason}",
            f"-DTRANSKIMMER_WERROR={'ON' if env_flag('TRANSKIMMER_WERROR') else 'OFF'}",
        ]

    def get_outputs(self) -> list[str]:
        return []  # cmake --install puts the files where they belong; setuptools has none to move


class Metadata(dist_info):
    """What pip asks for first: the error comes before it downloads a torch that was not chosen."""

    def run(self) -> None:
        require_torch()
        super().run()


if int(setuptools.__version__.split(".")[0]) < 77:  # older ones cannot read this pyproject.toml
    sys.exit(f"transkimmer: setuptools {setuptools.__version__} is too old: pip install -U 'setuptools>=77' wheel")
reason = why_not_native()
if reason:
    print(f"transkimmer: {reason}; installing the pure-Python reference kernels only", file=sys.stderr)
# One Extension without sources: it gives the wheel its platform tag. What an sdist needs of native code: MANIFEST.in.
native = Extension("transkimmer_kernels._native", sources=[])
commands = {"build": FreshBuild, "build_ext": CMakeBuild, "dist_info": Metadata}
setup(ext_modules=[] if reason else [native], cmdclass=commands)
