"""What every Triton backend file stands on: whether Triton can run here, and how its kernels are shown to compile."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

OLDEST = (3, 6)
# What the kernels compute in, by the names that Triton's types and the files of configurations have.
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# What a launcher passes beside a kernel's arguments, with Triton's own defaults.
_LAUNCH_OPTIONS = {"num_warps": 4, "num_stages": 3, "maxnreg": None}


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU. Read by Triton when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_not_importable() -> str | None:
    """None where a Triton that is new enough is installed."""
    try:  # not by its distribution, which has several names (triton, pytorch-triton)
        version = importlib.import_module("triton").__version__
    except ImportError:
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
    return "torch sees no CUDA device, and TRITON_INTERPRET=1, for Triton's interpreter, was not set beforehand"


def backend_modules() -> dict[str, ModuleType]:
    """Operator's folder -> its `triton.py`, imported, in a fixed order."""
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("ops/*/triton.py"))
    return {folder: importlib.import_module(f"{__package__}.ops.{folder}.triton") for folder in folders}


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


def specialise(
    name: str,
    kernel: Any,
    element: str,
    keywords: Mapping[str, Any],
    types: Mapping[str, str] | None = None,
    *,
    matmul: bool = False,
    target: str | None = None,
) -> Specialisation:
    """A `Specialisation` from what a launch passes by keyword.

    Args:
        element: what `p_*` arguments point to, one of `DTYPE_NAMES`' names or another Triton type; all other arguments
            are "i32".
        keywords: constexprs, launch options (num_warps, num_stages, maxnreg), and None for each pointer that is absent.
        types: exceptions, argument -> Triton type ("*i32", "fp32"); the kernel need not have them all.
        matmul, target: as in `Specialisation`.
    """
    options = {option: keywords.get(option, default) for option, default in _LAUNCH_OPTIONS.items()}
    constants = {key: value for key, value in keywords.items() if key not in options}
    arguments = [argument for argument in kernel.arg_names if argument not in constants]
    kinds = {argument: f"*{element}" if argument.startswith("p_") else "i32" for argument in arguments}
    kinds |= {argument: kind for argument, kind in (types or {}).items() if argument in kinds}
    aligned = tuple(argument for argument in arguments if argument.startswith("p_") or "stride" in argument)
    return Specialisation(name, kernel, kinds, constants, aligned, matmul=matmul, target=target, **options)
