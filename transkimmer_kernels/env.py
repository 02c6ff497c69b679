"""`python -m transkimmer_kernels.env [--json]`: what is installed, built and loaded, and what serves what."""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from . import cpu_products, native, tuning

# docs/building.md says what they do.
_VARIABLES = tuple(
    f"TRANSKIMMER_{name}" for name in ("KERNELS", "LIBRARY", "DISABLE_NATIVE", "CONFIGS", "CPU_PRODUCTS", "CPU_ISA")
)
_PACKAGES = ("transkimmer", "torch", "triton", "transformers", "numpy")


def report() -> dict[str, Any]:
    """The whole report as JSON-serialisable data; never raises because something is missing."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu": cpu_model(),
            "threads": torch.get_num_threads(),
            "cpu_kernels": _cpu_isa(),
            "gpu": _gpus()
            or ("none visible to torch" if torch.version.cuda else "none (torch was built without CUDA)"),
            "tuned": _tuned(),
            "torch_cuda": torch.version.cuda or "none",
        },
        "settings": {name: os.environ.get(name) or "not set" for name in _VARIABLES},
        "choice": _choice(),
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


def cpu_model() -> str:
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


@functools.cache
def cpuinfo() -> dict[str, str]:
    """Of the first processor that Linux lists."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}
    return {}


def _cpu_isa() -> str:
    """The instruction set that the CPU library chose on this machine."""
    if not native.status()["cpu"].loaded:
        return "none: the CPU library is not loaded"
    try:
        return cpu_products.instruction_set()
    except ValueError as error:
        return f"none: {error}"


def _choice() -> dict[str, str]:
    """What `kernels="auto"` means on the devices there are, and the form of the CPU kernels' weights."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    choice = {f"auto on {device}": _auto(device) for device in devices}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        choice[f"cpu products, {name}"] = _form(dtype)
    return choice


def _auto(device: str) -> str:
    """The backend that serves, or the backends with what each of them serves."""
    from .library import OPERATORS
    from .registry import BackendUnavailable, select_backend

    served: dict[str, list[str]] = {}
    try:
        for name in OPERATORS:
            served.setdefault(select_backend(name, "auto", device), []).append(name)
    except (BackendUnavailable, ValueError) as error:
        return f"nothing: {error}"
    if len(served) == 1:
        return next(iter(served))
    return ", ".join(f"{backend} ({', '.join(names)})" for backend, names in served.items())


def _form(dtype: torch.dtype) -> str:
    if not native.status()["cpu"].loaded:
        return "none: the CPU library is not loaded"
    try:
        return cpu_products.choose_form(dtype)
    except ValueError as error:
        return f"none: {error}"


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties]


def _tuned() -> str:
    """Files with measured configurations of the Triton kernels for the first device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said below
        found = tuning.files(torch.device("cuda", 0)) if torch.cuda.is_available() else []
    if (reason := tuning.why_not_own()) is not None:
        return "; ".join(map(str, [reason, *found]))
    return "; ".join(map(str, found)) or "no configurations measured on this device: the kernels' defaults"


def _operators() -> dict[str, dict[str, str]]:
    from .registry import table  # here, so that the other sections do not depend on the operators

    return dict(table())


def _format(data: dict[str, Any]) -> str:
    lines: list[str] = []
    for section in ("versions", "machine", "settings", "choice", "build"):
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
