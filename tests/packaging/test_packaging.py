"""Builds, imports and reports: what is promised when something is missing. Each case is a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from transkimmer_kernels import env, native

ROOT = Path(__file__).parents[2]
SETUP = "import runpy, sys; sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py')"
HIDE_TORCH = """
import importlib.util as u
find = u.find_spec
u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)
"""
# A forward on the CPU, whatever serves it; prints the backend.
USE = """
import torch, transkimmer_kernels as tk
x, cu = torch.randn(3, 16), torch.tensor([0, 3], dtype=torch.int32)
y = tk.ragged_linear(x, torch.randn(8, 16), None, cu)
assert y.shape == (3, 8) and y.isfinite().all()
print(tk.kernel_set('auto', 'cpu').serves['ragged_linear'], tk.native.status())
"""


def _python(code: str, *, expect: int = 0, **environment: str) -> tuple[str, str]:
    """(stdout, stderr) of `python -c code`, run in the checkout."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == expect, run.stderr
    return run.stdout, run.stderr


def _needs(library: str) -> Path:
    path = native.status()[library].path
    if not path.is_file():
        pytest.skip(f"{path.name} was not built here")
    return path


def test_import_without_triton() -> None:
    _needs("cpu")
    out, _ = _python("import sys; sys.modules['triton'] = None" + USE)
    assert out.startswith("cpu ")


def test_import_without_native_libraries() -> None:
    out, _ = _python(USE, TRANSKIMMER_DISABLE_NATIVE="1")
    assert out.startswith("reference ")
    assert "disabled by TRANSKIMMER_DISABLE_NATIVE" in out


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_broken_library_is_reported_and_survived(name: str, tmp_path: Path) -> None:
    broken = tmp_path / f"broken_{name}.so"
    broken.write_text("not a library")
    out, _ = _python(
        USE.replace("None, cu)", "None, cu, kernels='reference')").replace("'auto'", "'reference'"),
        TRANSKIMMER_LIBRARY=str(broken),
    )
    assert "loaded=False, reason='" in out
    assert "broken_" in out
    assert out.startswith("reference ")


def test_auto_does_without_a_broken_cuda_library_but_not_without_a_cpu_library_asked_for_by_name(
    tmp_path: Path,
) -> None:
    _needs("cpu")
    broken = {name: tmp_path / f"broken_{name}.so" for name in ("cpu", "cuda")}
    for path in broken.values():
        path.write_text("not a library")
    out, _ = _python(USE, TRANSKIMMER_LIBRARY=str(broken["cuda"]))
    assert out.startswith("cpu ")
    # Falling back on plain PyTorch in silence would hide that what was asked for is not what runs.
    _, error = _python(USE, expect=1, TRANSKIMMER_LIBRARY=str(broken["cpu"]))
    assert "BackendUnavailable" in error and "broken_cpu.so" in error and "unset TRANSKIMMER_LIBRARY" in error


def test_the_cuda_library_does_not_load_without_cuda_and_says_so() -> None:
    """The real file, asked for by name: it needs libtorch_cuda.so, which a CPU build of torch does not have."""
    import torch

    path = _needs("cuda")
    if torch.version.cuda is not None:
        pytest.skip(f"this torch has CUDA {torch.version.cuda}")
    out, _ = _python(USE, TRANSKIMMER_LIBRARY=str(path))
    assert "libtorch_cuda.so" in out.partition("'cuda'")[2]


def test_the_cuda_library_registers_what_it_should() -> None:
    """With the stand-in for libtorch_cuda.so that it was linked against, the real file loads without CUDA."""
    import torch

    stub = ROOT / "build/cmake/stub"
    if torch.version.cuda is not None or not (stub / "libtorch_cuda.so").is_file():
        pytest.skip("torch has CUDA, or the CUDA library was not built in this checkout")
    check = """
import torch, transkimmer_kernels as tk
assert tk.native.status()['cuda'].loaded, tk.native.status()['cuda']
for kernel in ('compact.cuda', 'gather_rows.cuda', 'scatter_rows.cuda'):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'transkimmer::{kernel}', 'CUDA'), kernel
for name in ('short_attention', 'skim_logit', 'skim_tokens'):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'transkimmer_cuda::{name}', 'CUDA'), name
    print(getattr(torch.ops.transkimmer_cuda, name).default._schema)
print(tk.native.why_not('cuda'))
"""
    out, _ = _python(check, TRANSKIMMER_LIBRARY=str(_needs("cuda")), LD_LIBRARY_PATH=str(stub))
    *schemas, reason = out.strip().splitlines()
    assert schemas[0].startswith("transkimmer_cuda::short_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q")
    assert reason == "torch was built without CUDA"


def test_the_cuda_library_is_built_where_nvcc_is() -> None:
    out, _ = _python("import runpy, sys; sys.argv = ['setup.py', '--name']; s = runpy.run_path('setup.py')\n"
                     "print('\\n', s['find_nvcc'](), s['env_flag']('TRANSKIMMER_SKIP_CUDA_BUILD'))")  # fmt: skip
    nvcc, skipped = out.split()[-2:]
    if nvcc == "None" or skipped == "True":
        pytest.skip("no nvcc, or TRANSKIMMER_SKIP_CUDA_BUILD is set")
    assert native.status()["cuda"].path.is_file()
    if (cuobjdump := Path(nvcc).with_name("cuobjdump")).is_file():
        listed = subprocess.run(
            [cuobjdump, "--list-elf", native.status()["cuda"].path], capture_output=True, text=True, check=True
        )
        assert "sm_" in listed.stdout


def test_the_toolkit_that_is_asked_for_comes_before_paths(tmp_path: Path) -> None:
    for name in ("home", "path"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin/nvcc").write_text("#!/bin/sh\n")
        (tmp_path / name / "bin/nvcc").chmod(0o755)
    found = SETUP.replace("runpy.run_path", "s = runpy.run_path") + "; print('\\n', s['find_nvcc']())"
    path = f"{tmp_path / 'path/bin'}{os.pathsep}{os.environ['PATH']}"

    def nvcc(**variables: str) -> str:
        unset = {"CUDACXX": "", "CUDA_HOME": "", "CUDA_PATH": ""}
        return _python(found, PATH=path, **{**unset, **variables})[0].split()[-1]

    home, asked = str(tmp_path / "home"), str(tmp_path / "home/bin/nvcc")
    assert nvcc() == str(tmp_path / "path/bin/nvcc")
    assert nvcc(CUDA_HOME=home) == nvcc(CUDA_PATH=home) == nvcc(CUDACXX=f"{asked} -Xcompiler -O1") == asked
    assert nvcc(CUDACXX=str(tmp_path / "nowhere"), CUDA_HOME=home) == "None"


def test_the_report_names_every_operator_and_reason() -> None:
    out, _ = _python("from transkimmer_kernels.env import main; main(['--json'])")
    data = json.loads(out)
    assert {"compact", "encoder_layer_", "ragged_attention"} <= set(data["operators"])
    for row in data["operators"].values():
        assert row["reference"] == "available"
        assert all(row.values()), "an unavailable backend says why"


def test_the_report_that_people_read_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    env.main([])
    text = capsys.readouterr().out
    for name, row in env.report()["operators"].items():
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
        for state, number in zip(row.values(), re.findall(r"available|no \[(\d+)\]", line), strict=True):
            assert (number == "") == (state == "available")
            assert not number or f"[{number}] {state.removesuffix(f' for {name}')}" in text


def test_setup_without_torch_is_one_line_with_the_command() -> None:
    if any(shutil.which(tool) is None for tool in ("c++", "cmake")):
        pytest.skip("no C++ compiler or cmake: setup.py would not ask for torch")
    for command in ("dist_info", "build_ext"):  # pip asks for the first before it looks for dependencies
        _, err = _python(HIDE_TORCH + SETUP.replace("--name", command), expect=1)
        assert err.strip().splitlines()[-1] == (
            "transkimmer: torch is not importable here; install torch>=2.10 first, "
            "then run: pip install --no-build-isolation ."
        )


def test_setup_without_a_compiler_installs_the_reference() -> None:
    _, err = _python(SETUP, PATH="/nonexistent", CXX="")
    assert "a C++ compiler" in err
    assert "not found; installing the pure-Python reference kernels only" in err


def test_a_pure_wheel_works_anywhere(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.so", "results", "__pycache__"))
    environment = {**os.environ, "TRANSKIMMER_SKIP_NATIVE_BUILD": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, source]
    subprocess.run(build, check=True, env=environment, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert not any(name.endswith(".so") for name in files)
    assert {"transkimmer/demo/model.safetensors", "transkimmer_kernels/ops/compact/reference.py"} <= set(files)
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    out, _ = _python(f"import sys; sys.path[:0] = [{str(tmp_path / 'installed')!r}]\nimport os; os.chdir('/')" + USE)
    assert out.startswith("reference ")
    assert "was not built" in out


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("8.0;9.0a+PTX", "80-real;90a-real;90a-virtual"), ("9.0 10.0", "90-real;100-real"), ("ampere", None)],
)
def test_torch_cuda_arch_list(wanted: str, expected: str | None, tmp_path: Path) -> None:
    script = tmp_path / "print.cmake"
    script.write_text(
        f'include("{ROOT}/cmake/cuda_architectures.cmake")\n'
        'transkimmer_cuda_architectures(found nvcc)\nmessage("${found}")\n'
    )
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if cmake is None:
        pytest.skip("cmake was not found")
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": wanted}
    run = subprocess.run([cmake, "-P", script], env=environment, capture_output=True, text=True, check=False)
    if expected is None:
        assert run.returncode
        assert "'ampere' is not an architecture" in " ".join(run.stderr.split())
    else:
        assert run.stderr.strip() == expected
