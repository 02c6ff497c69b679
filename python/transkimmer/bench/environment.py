"""What figures depend on besides the command that made them."""

from __future__ import annotations

import contextlib
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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "libraries": {name: status.reason or "loaded" for name, status in native.status().items()},
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
