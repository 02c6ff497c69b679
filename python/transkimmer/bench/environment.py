"""What figures depend on besides the command that made them."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers

from transkimmer_kernels import native
from transkimmer_kernels.env import cpu_model, cpuinfo


def environment() -> dict[str, Any]:
    """Versions, the machine, the threads and the native libraries; gpu: its name, None where torch sees none."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": cpu_model(),
        "generation": generation(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "libraries": {name: status.reason or "loaded" for name, status in native.status().items()},
    }


# Vendor and family of processors whose model name does not tell them from others with the same instructions.
_GENERATIONS = {("AuthenticAMD", "26"): "Zen 5"}


def generation() -> str | None:
    """What the instruction set leaves open about this machine's speed; None where nothing is known."""
    found = cpuinfo()
    return _GENERATIONS.get((found.get("vendor_id", ""), found.get("cpu family", "")))
