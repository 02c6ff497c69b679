"""`choose_rows` in Triton: a kernel each way, which reads and writes every row once.

Forwards only the operand that is chosen is read. Backwards all three gradients come from one read of the rows, of both
operands and of their gradient; in single operators that is nine passes, four of them over rows in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import triton_support
from ...library import implement
from ...triton_support import DTYPE_NAMES, Specialisation, specialise

_TILE = 2048  # elements that a program has in hand
_NUM_WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def choose_rows_kernel(
    p_out, p_keep, p_hidden, p_final, rows, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[i] = hidden[i] if keep[i] != 0 else final[i]. Grid: row tiles."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.arange(0, BLOCK)
    m_row = o_row < rows
    m_x = m_row[:, None] & (o_col < SIZE)[None, :]
    o_x = o_row[:, None] * SIZE + o_col[None, :]  # [ROWS, BLOCK]
    m_kept = (tl.load(p_keep + o_row, mask=m_row, other=0.0) != 0)[:, None]
    b_hidden = tl.load(p_hidden + o_x, mask=m_x & m_kept, other=0.0)
    b_final = tl.load(p_final + o_x, mask=m_x & (m_kept == 0), other=0.0)
    tl.store(p_out + o_x, tl.where(m_kept, b_hidden, b_final), mask=m_x)


@triton.jit(do_not_specialize=["rows"])
def choose_rows_backward_kernel(
    p_grad_keep,  # fp32 [rows], written, or None
    p_grad_hidden,  # [rows, SIZE], written
    p_grad_final,  # [rows, SIZE], written
    p_grad,  # [rows, SIZE]
    p_keep,  # fp32 [rows]
    p_hidden,  # [rows, SIZE]
    p_final,  # [rows, SIZE]
    rows,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.arange(0, BLOCK)
    m_row = o_row < rows
    m_x = m_row[:, None] & (o_col < SIZE)[None, :]
    o_x = o_row[:, None] * SIZE + o_col[None, :]  # [ROWS, BLOCK]
    b_keep = tl.load(p_keep + o_row, mask=m_row, other=0.0)
    b_grad = tl.load(p_grad + o_x, mask=m_x, other=0.0).to(tl.float32)
    if p_grad_keep is not None:
        b_apart = tl.load(p_hidden + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_apart -= tl.load(p_final + o_x, mask=m_x, other=0.0).to(tl.float32)
        tl.store(p_grad_keep + o_row, tl.sum(b_apart * b_grad, 1), mask=m_row)
    b_to_hidden = b_grad * b_keep[:, None]
    dtype: tl.constexpr = p_grad_hidden.dtype.element_ty
    tl.store(p_grad_hidden + o_x, b_to_hidden.to(dtype), mask=m_x)
    tl.store(p_grad_final + o_x, (b_grad - b_to_hidden).to(dtype), mask=m_x)


def _shape(size: int) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    return {"SIZE": size, "ROWS": max(1, _TILE // block), "BLOCK": block, "num_warps": _NUM_WARPS}


@implement("choose_rows", "triton", available=triton_support.why_not)
def choose_rows(keep: Tensor, hidden: Tensor, final: Tensor) -> Tensor:
    rows, size = hidden.shape
    out = torch.empty((rows, size), dtype=hidden.dtype, device=hidden.device)
    if rows:
        shape = _shape(size)
        operands = (keep.contiguous(), hidden.contiguous(), final.contiguous())
        with torch.cuda.device_of(hidden):
            grid = (triton.cdiv(rows, shape["ROWS"]),)
            choose_rows_kernel[grid](out, *operands, rows, **shape)
    return out


@implement("choose_rows_backward", "triton", available=triton_support.why_not)
def choose_rows_backward(
    grad: Tensor, keep: Tensor, hidden: Tensor, final: Tensor, of_keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, size = hidden.shape
    grad = grad.contiguous()
    grad_hidden, grad_final = torch.empty_like(grad), torch.empty_like(grad)
    grad_keep = torch.empty(rows if of_keep else 0, dtype=torch.float32, device=grad.device)
    if rows:
        shape = _shape(size)
        operands = (grad, keep.contiguous(), hidden.contiguous(), final.contiguous())
        with torch.cuda.device_of(hidden):
            grid = (triton.cdiv(rows, shape["ROWS"]),)
            gradients = (grad_keep if of_keep else None, grad_hidden, grad_final)
            choose_rows_backward_kernel[grid](*gradients, *operands, rows, **shape)
    return grad_keep, grad_hidden, grad_final


# ---- what is compiled ahead of time


def specialisations() -> Iterator[Specialisation]:
    """At the usual widths in every dtype."""
    types = {"p_keep": "*fp32", "p_grad_keep": "*fp32"}
    for kind in DTYPE_NAMES.values():
        for size in (384, 768, 1024):
            for kernel, name in ((choose_rows_kernel, ""), (choose_rows_backward_kernel, " backward")):
                yield specialise(f"choose_rows {size} {kind}{name}", kernel, kind, _shape(size), types)
