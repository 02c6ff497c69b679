"""What figures depend on besides the command that made them."""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from transkimmer_kernels import native


def environment() -> dict[str, Any]:
    """Versions, the machine, the threads and the native libraries; gpu: its name, None where torch sees none."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": _processor(),
        "generation": generation(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "libraries": {name: status.reason or "loaded" for name, status in native.status().items()},
    }


def _processor() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


# Vendor and family of processors whose model name does not tell them from others with the same instructions.
_GENERATIONS = {("AuthenticAMD", "26"): "Zen 5"}


def generation() -> str | None:
    """What the instruction set leaves open about this machine's speed; None where nothing is known."""
    found = _cpuinfo()
    return _GENERATIONS.get((found.get("vendor_id", ""), found.get("cpu family", "")))


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Of the first processor that Linux lists."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}
    return {}
