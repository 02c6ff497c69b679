"""`python -m transkimmer_kernels.resources`: registers and memory of the compiled CUDA kernels, and whether any spills.

Reads the built library, so no GPU is needed. The exit status is 1 if a kernel uses local memory, and `--update FILE`
writes the table between the marks in that file.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import native

BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"
# Registers per thread beyond which the hardware cannot go.
MOST_REGISTERS = 255


@dataclass(frozen=True)
class Usage:
    """One kernel for one architecture: registers per thread; bytes of shared memory per block that the code itself
    names (a launch may ask for more); bytes of local memory per thread, where spilled registers and arrays go. A cubin
    by itself does not say its architecture, which is "" then."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    local: int


def triton_cuobjdump() -> str | None:
    """The tool that comes with Triton, which knows whatever Triton's assembler writes."""
    triton = importlib.util.find_spec("triton")
    if triton is None or not triton.origin:
        return None
    return shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends/nvidia/bin"))


def find_cuobjdump() -> str | None:
    """The tool of the CUDA toolkit, or the one that comes with Triton."""
    candidates = [shutil.which("cuobjdump")]
    if (nvcc := shutil.which("nvcc")) is not None:
        candidates.append(shutil.which("cuobjdump", path=str(Path(nvcc).resolve().parent)))
    return next(filter(None, candidates), None) or triton_cuobjdump()


def why_not() -> str | None:
    """None where the table can be made, else the reason."""
    path = native.status()["cuda"].path
    if not path.is_file():
        return f"{path.name} was not built"
    return None if find_cuobjdump() else "cuobjdump was found neither on PATH nor with Triton"


def read(binary: Path, tool: str | None = None) -> list[Usage]:
    """Every kernel in a library or a cubin, by name, then architecture; tool: a cuobjdump, else the one found."""
    tool = tool or find_cuobjdump()
    assert tool is not None, "ask why_not() first"
    run = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
    return parse(run.stdout.splitlines())


def parse(lines: Iterable[str]) -> list[Usage]:
    """From the output of `cuobjdump --dump-resource-usage`."""
    found, architecture, kernel = [], "", ""
    for line in lines:
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r" *Function (\S+):", line):
            kernel = short_name(match[1])
        elif "REG:" in line:
            usage = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}
            local = usage["STACK"] + usage["LOCAL"]
            found.append(Usage(kernel, architecture, usage["REG"], usage["SHARED"], local))
    return sorted(found, key=lambda u: (u.kernel, _number(u.architecture)))


def _number(architecture: str) -> int:
    """90 of "sm_90a", 0 of none."""
    return int(re.sub(r"\D", "", architecture) or 0)


def short_name(symbol: str) -> str:
    """`rows_kernel<Fp16, 32>` from a mangled symbol."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    pointer = demangle(symbol.encode(), None, None, ctypes.byref(status))
    name = ctypes.string_at(pointer).decode() if pointer and status.value == 0 else symbol
    name = re.sub(r"transkimmer::|\(anonymous namespace\)::", "", name)
    name = re.sub(r"\(.*\)$", "", name).removeprefix("void ").replace("> >", ">>")
    for long, short in (("char", "uint8"), ("short", "uint16"), ("int", "uint32")):
        name = name.replace(f"unsigned {long}", short)
    return name


def problems(usages: Iterable[Usage]) -> list[str]:
    """What must not be: spilled registers or arrays in local memory."""
    return [f"{u.kernel} on {u.architecture}: {u.local} bytes of local memory" for u in usages if u.local]


def markdown(usages: list[Usage]) -> str:
    """One line per kernel; an architecture's cell is registers, bytes of shared memory in the code, local memory."""
    architectures = sorted({u.architecture for u in usages}, key=_number)
    lines = [
        f"Compiled with nvcc {nvcc_version()}.",
        "",
        f"| kernel | {' | '.join(architectures)} |",
        f"|---|{'---|' * len(architectures)}",
    ]
    for kernel in dict.fromkeys(u.kernel for u in usages):
        row = {u.architecture: f"{u.registers}, {u.shared}, {u.local}" for u in usages if u.kernel == kernel}
        lines.append(f"| `{kernel}` | {' | '.join(row.get(name, '-') for name in architectures)} |")
    return "\n".join(lines)


def nvcc_version() -> str:
    return native.build_info().get("nvcc", "of unknown version")


def documented(text: str) -> str:
    """The table in a document."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def update(path: Path, table: str) -> None:
    if not path.is_file():
        sys.exit(f"{path}: is not a file")
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        sys.exit(f"{path}: has no lines {BEGIN} and {END}")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m transkimmer_kernels.resources", description="Resource usage of the compiled CUDA kernels."
    )
    parser.add_argument("--update", type=Path, metavar="FILE", help="write the table between the marks in this file")
    options = parser.parse_args(arguments)
    if (reason := why_not()) is not None:
        sys.exit(f"transkimmer_kernels.resources: {reason}")
    usages = read(native.status()["cuda"].path)
    print(f"{'kernel':<52} {'target':<8} {'registers':>9} {'shared':>7} {'local':>6}")
    for u in usages:
        print(f"{u.kernel:<52} {u.architecture:<8} {u.registers:>9} {u.shared:>7} {u.local:>6}")
    if options.update is not None:
        update(options.update, markdown(usages))
    failed = problems(usages)
    print("\n".join(failed) or f"{len(usages)} compiled kernels, none with local memory")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
