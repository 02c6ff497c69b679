"""`python -m transkimmer_kernels.aot`: compiles every Triton kernel ahead of time, without a GPU, and checks it.

Every `ops/<operator>/triton.py` lists its kernels in every shipped configuration (`specialisations()`), as its
launcher would specialise them; without the divisibility of pointers, for one, loads would be scalar and the report
would describe another kernel than the one that runs. Checked on each target: nothing spills to local memory, shared
memory fits, and matrix products use matrix instructions. The targets of AMD are reported, not checked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import resources, triton_support
from .triton_support import Specialisation

# Shared memory that a block may have (CUDA C++ programming guide, table of compute capabilities).
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
TARGETS = tuple(SHARED_LIMIT)
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma")


@dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel for one target; bytes per thread (spilled) and per block (shared)."""

    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    matrix: str
    async_copies: bool
    problems: tuple[str, ...]


def kernels() -> list[tuple[str, Specialisation]]:
    """(operator's folder, specialisation) of every Triton backend file, in a fixed order."""
    modules = triton_support.backend_modules()
    return [(folder, entry) for folder, module in modules.items() for entry in module.specialisations()]


def compile_kernel(entry: Specialisation, target: str) -> Report:
    """Compiles for "sm_90" and the like, or for "gfx942"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(entry.kernel.arg_names)
    signature = {name: entry.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in entry.aligned}
    source = ASTSource(entry.kernel, signature, dict(entry.constants), attributes)
    device = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    # Multiply-adds are fused, as launchers do so far; Triton 3.9 warns that its default will change.
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages, "enable_fp_fusion": True}
    if entry.maxnreg is not None:
        options["maxnreg"] = entry.maxnreg
    compiled = triton.compile(source, target=device, options=options)
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    registers, spilled = _amd_usage(text) if target.startswith("gfx") else _usage(compiled.asm["cubin"])
    matrix = next((name for name in MATRIX_INSTRUCTIONS if name in text), "")
    shared = int(compiled.metadata.shared)
    problems = [f"{spilled} bytes spilled"] if spilled else []
    if shared > SHARED_LIMIT.get(target, shared):
        problems.append(f"{shared} bytes of shared memory, more than {SHARED_LIMIT[target]}")
    if entry.matmul and not matrix:
        problems.append("no matrix instruction")
    return Report(entry.name, target, registers, spilled, shared, matrix, "cp.async" in text, tuple(problems))


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory per thread) of the one kernel in it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (usage,) = resources.read(Path(file.name), resources.triton_cuobjdump())
    return usage.registers, usage.local


def _amd_usage(text: str) -> tuple[int, int]:
    found = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count): +(\d+)", text)}
    return found.get("vgpr_count", 0), 4 * found.get("vgpr_spill_count", 0)


def _compile(index: int, target: str) -> Report:
    return compile_kernel(kernels()[index][1], target)


def compile_all(targets: Sequence[str], operators: Sequence[str] = (), jobs: int | None = None) -> list[Report]:
    """Every kernel (of the named operator folders) for every target, on several processes."""
    chosen = [(i, entry) for i, (folder, entry) in enumerate(kernels()) if not operators or folder in operators]
    work = [(i, target) for i, entry in chosen for target in targets if entry.target in (None, target)]
    with ProcessPoolExecutor(jobs or os.cpu_count()) as pool:
        return list(pool.map(_compile, *zip(*work, strict=True))) if work else []


def target(text: str) -> str:
    """An argument of --targets, as it is."""
    if not re.fullmatch(r"sm_([89]\d|1\d\d)|gfx[0-9a-f]{3,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must look like sm_80, sm_90, sm_100 or gfx942")
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m transkimmer_kernels.aot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--targets", nargs="+", type=target, default=list(TARGETS), help="sm_80, sm_90, ..., gfx942")
    parser.add_argument("--operators", nargs="+", default=[], metavar="OPERATOR", help="folders under ops/")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    options: Any = parser.parse_args(arguments)
    if (reason := triton_support.why_not_importable()) is not None:
        sys.exit(f"transkimmer_kernels.aot: {reason}")
    if triton_support.interpreted():
        sys.exit("transkimmer_kernels.aot: TRITON_INTERPRET=1 is set, under which nothing is compiled; unset it")
    folders = sorted({folder for folder, _ in kernels()})
    if unknown := sorted(set(options.operators) - set(folders)):
        parser.error(f"--operators {' '.join(unknown)}: must be among {', '.join(folders)}")
    reports = compile_all(options.targets, options.operators)
    print(f"{'kernel':<56} {'target':<7} {'regs':>4} {'spill':>5} {'shared':>7}  {'matrix':<15} async  problems")
    for r in reports:
        problems = ", ".join(r.problems) or "-"
        copies = "yes" if r.async_copies else "no"
        print(
            f"{r.kernel:<56} {r.target:<7} {r.registers:>4} {r.spilled:>5} {r.shared:>7}  "
            f"{r.matrix or '-':<15} {copies:<5}  {problems}"
        )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(r) for r in reports], indent=2) + "\n", encoding="utf-8")
    failed = [r for r in reports if r.problems and not r.target.startswith("gfx")]
    print(f"{len(reports)} compiled, {len(failed)} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
