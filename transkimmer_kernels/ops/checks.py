"""Argument checks shared by the operators: each failure names the argument, its value and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import select_backend


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def check_tensor(
    name: str,
    tensor: Tensor,
    *,
    dim: int | None = None,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
    shape: tuple[int | None, ...] | None = None,
) -> None:
    """Checks kind, rank, dtype, device and, where given, the sizes (None matches any size)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    # No `require` here: formatting a message that is never shown takes longer than the check.
    if dim is not None and tensor.dim() != dim:
        raise ValueError(f"{name}: expected {dim} dimensions, got {describe(tensor)}")
    if dtype is not None:
        allowed = dtype if isinstance(dtype, tuple) else (dtype,)
        if tensor.dtype not in allowed:
            raise TypeError(f"{name}: expected dtype {' or '.join(map(str, allowed))}, got {describe(tensor)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {describe(tensor)}")
    if shape is not None:
        fits = tensor.dim() == len(shape) and all(
            want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            wanted = "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
            raise ValueError(f"{name}: expected shape {wanted}, got {describe(tensor)}")


def check_weight(
    name: str, weight: Tensor, like: Tensor, shape: tuple[int | None, ...], operator: str, kernels: str
) -> None:
    """A matrix of `shape` and of the dtype and device of `like`; for `cpu` it may be packed (`cpu_products.py`)."""
    panels = isinstance(weight, Tensor) and weight.dim() == 3 and weight.stride(2) == 0
    panels = panels and select_backend(operator, kernels, like.device.type, like.dtype) == "cpu"
    wanted = (*shape, None) if panels else shape
    check_tensor(name, weight, dtype=like.dtype, device=like.device, shape=wanted)
    if panels or weight.is_mkldnn:
        refuse_gradients(f"{name}, packed", "pass the matrix", weight, like)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_cu_seqlens(name: str, cu_seqlens: Tensor, capacity: int, device: torch.device) -> None:
    """`cu_seqlens`: int32 [batch + 1], from 0, non-decreasing, at most `capacity`.

    The values are looked at only on a CPU tensor: on a GPU that would stop the stream, and what kernels there make of a
    bad offset is undefined.
    """
    check_tensor(name, cu_seqlens, dim=1, dtype=torch.int32, device=device)
    require(cu_seqlens.numel() >= 1, f"{name}: expected batch + 1 >= 1 entries, got an empty tensor")
    if device.type != "cpu":
        return
    require(int(cu_seqlens[0]) == 0, f"{name}: must start at 0, got {int(cu_seqlens[0])}")
    if cu_seqlens.numel() > 1:
        steps = cu_seqlens.diff()
        at = int(steps.argmin())
        require(
            int(steps[at]) >= 0,
            f"{name}: must not decrease, got {int(cu_seqlens[at])} then {int(cu_seqlens[at + 1])} at entry {at + 1}",
        )
    count = int(cu_seqlens[-1])
    require(count <= capacity, f"{name}: its last entry, {count} tokens, exceeds the capacity of {capacity} rows")


def check_max_seqlen(name: str, bound: int, cu_seqlens: Tensor) -> None:
    """`bound` is at least the longest sequence (looked at on CPU only)."""
    longest = int(cu_seqlens.diff().max()) if cu_seqlens.device.type == "cpu" and cu_seqlens.numel() > 1 else 0
    require(bound >= longest, f"{name}: must be at least the longest sequence, {longest}, got {bound}")


def check_slots(name: str, slots: Tensor, cu_seqlens: Tensor, rows: int) -> None:
    """`slots`: int32 [capacity]; the first `cu_seqlens[-1]` of them must lie in [0, rows) (looked at on CPU only)."""
    check_tensor(name, slots, dim=1, dtype=torch.int32, device=cu_seqlens.device)
    check_cu_seqlens("cu_seqlens", cu_seqlens, slots.numel(), slots.device)
    if slots.device.type == "cpu":
        check_rows(name, slots[: int(cu_seqlens[-1])], rows)


def check_rows(name: str, numbers: Tensor, rows: int) -> None:
    """Row numbers, all of which must lie in [0, rows) (looked at on CPU only)."""
    if numbers.device.type == "cpu" and numbers.numel():
        low, high = int(numbers.min()), int(numbers.max())
        require(low >= 0 and high < rows, f"{name}: must lie in [0, {rows}), got values from {low} to {high}")


def refuse_gradients(operator: str, instead: str, *tensors: Tensor | None) -> None:
    """RuntimeError where a gradient would be wanted of an operator that has none: it would be missing silently."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{operator}: not differentiable; {instead}, or no_grad")


def check_apart(name: str, tensor: Tensor, written: Tensor) -> None:
    """No element of `tensor` is one of `hidden`, which is `written` while others are read; both are contiguous."""
    if torch.compiler.is_compiling() or tensor.untyped_storage()._cdata != written.untyped_storage()._cdata:
        return
    begin, other = tensor.storage_offset(), written.storage_offset()
    require(
        begin >= other + written.numel() or other >= begin + tensor.numel(),
        f"{name}: shares memory with hidden, which is written while it is read; pass a copy",
    )
