"""What every Triton backend file stands on: whether Triton can run here, and how its kernels are shown to compile."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

OLDEST = (3, 6)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU. Read by Triton when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_not_importable() -> str | None:
    """None where a Triton that is new enough is installed."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        return f"triton {version} is older than {'.'.join(map(str, OLDEST))}"
    return None


def why_not() -> str | None:
    """None where Triton kernels can run: on a CUDA device, or in the interpreter."""
    if (reason := why_not_importable()) is not None:
        return reason
    if interpreted() or torch.cuda.is_available():
        return None
    return "torch sees no CUDA device (with TRITON_INTERPRET=1 set beforehand, kernels run in Triton's interpreter)"


@dataclass(frozen=True)
class Specialisation:
    """One kernel in one shipped configuration, as its launcher specialises it; `transkimmer_kernels.aot` compiles it.

    signature: argument -> Triton type ("*bf16", "i32", ...), every argument that is not a constexpr; constants: the
    constexprs; aligned: arguments that the launcher finds divisible by 16 (all pointers, as PyTorch allocates them,
    and strides that are); matmul: whether matrix instructions must appear; maxnreg: registers a thread may have,
    where the launcher says so; target: the only one that it is for ("sm_90"), None for any.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    matmul: bool
    maxnreg: int | None = None
    target: str | None = None
