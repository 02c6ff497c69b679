"""`python -m transkimmer_kernels.env [--json]`: what is installed, built and loaded, and what serves what."""

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from . import native, tuning

_PACKAGES = ("transkimmer", "torch", "triton", "transformers", "numpy")


def report() -> dict[str, Any]:
    """The whole report as JSON-serialisable data; never raises because something is missing."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu": _cpu_model(),
            "threads": torch.get_num_threads(),
            "cpu_kernels": _cpu_isa(),
            "gpu": _gpus()
            or ("none visible to torch" if torch.version.cuda else "none (torch was built without CUDA)"),
            "tuned": _tuned(),
            "torch_cuda": torch.version.cuda or "none",
        },
        "build": native.build_info(),
        "libraries": {
            name: {"file": str(entry.path), "loaded": entry.loaded, "reason": entry.reason}
            for name, entry in native.status().items()
        },
        "operators": _operators(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_isa() -> str:
    """The instruction set that the CPU library chose on this machine."""
    if not native.status()["cpu"].loaded:
        return "none: the CPU library is not loaded"
    try:
        return str(torch.ops.transkimmer_cpu.isa())
    except RuntimeError as error:  # TRANSKIMMER_CPU_ISA names one that is not there
        return f"none: {error}"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties]


def _tuned() -> str:
    """Files with measured configurations of the Triton kernels for the first device."""
    found = tuning.files(torch.device("cuda", 0)) if torch.cuda.is_available() else []
    return "; ".join(map(str, found)) or "no configurations measured on this device: the kernels' defaults"


def _operators() -> dict[str, dict[str, str]]:
    from .registry import table  # here, so that the other sections do not depend on the operators

    return dict(table())


def _format(data: dict[str, Any]) -> str:
    lines: list[str] = []
    for section in ("versions", "machine", "build"):
        lines.append(f"{section}:")
        width = max(map(len, data[section]))
        for key, value in data[section].items():
            lines.append(f"  {key:<{width}}  {'; '.join(value) if isinstance(value, list) else value}")
    lines.append("libraries:")
    for name, entry in data["libraries"].items():
        lines.append(f"  {name:<4}  {'loaded' if entry['loaded'] else 'not loaded: ' + entry['reason']}")
        lines.append(f"        {entry['file']}")
    return "\n".join([*lines, *_format_operators(data["operators"])])


def _format_operators(operators: dict[str, dict[str, str]]) -> list[str]:
    """A table operator x backend; what is not available gets a number, explained below the table."""
    backends = list(next(iter(operators.values()), {}))
    reasons: list[str] = []
    width = max(map(len, operators), default=0)
    lines = ["operators:", f"  {'':<{width}}  " + "  ".join(f"{backend:<9}" for backend in backends)]
    for name, row in operators.items():
        cells = []
        for state in row.values():
            state = state.removesuffix(f" for {name}")
            if state != "available" and state not in reasons:
                reasons.append(state)
            cells.append("available" if state == "available" else f"no [{reasons.index(state) + 1}]")
        lines.append(f"  {name:<{width}}  " + "  ".join(f"{cell:<9}" for cell in cells))
    return [line.rstrip() for line in lines] + [f"  [{i}] {reason}" for i, reason in enumerate(reasons, 1)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m transkimmer_kernels.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    as_json = parser.parse_args(arguments).json
    data = report()
    print(json.dumps(data, indent=2) if as_json else _format(data))


if __name__ == "__main__":
    main()
