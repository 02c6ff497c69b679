"""`add_norm` in Triton: one kernel forwards, and two backwards for the gradients of the sum, the weight and the bias.

Forwards a program takes a few rows: it reads both operands, writes the sum, which the backward needs, and the result;
and 8 bytes of statistics per row. PyTorch reads the sum once more.

Backwards a program walks over rows and adds up, in registers, what weight and bias get from them; it writes that once,
and a second kernel sums up the programs' parts, always in the same order, and casts the sums. So the gradient and the
sum are read once, where PyTorch's kernels read both twice, the second time column by column: of a training step of
BERT-base that alone took 6 % on an H200 (docs/gpu.md has the times).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import triton_support
from ...library import implement
from ...triton_blocks import centre, multiprocessors
from ...triton_support import DTYPE_NAMES, Specialisation, specialise
from . import sum_dtype

_TILE, _BACKWARD_TILE = 4096, 2048  # elements that a program has in hand
_PROGRAMS = 4  # of the backward, per multiprocessor
_PARTS, _COLUMNS = 128, 32  # of the programs' parts, that are in hand at a time: a line of each


@triton.jit(do_not_specialize=["rows"])
def add_norm_kernel(
    p_y,  # [rows, SIZE], written
    p_total,  # [rows, SIZE], written; None without p_residual
    p_statistics,  # fp32 [2, rows], written: mean, and 1 / standard deviation
    p_x,  # [rows, SIZE]
    p_residual,  # [rows, SIZE] or None
    p_weight,  # [SIZE]
    p_bias,  # [SIZE]
    rows,
    eps,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = LayerNorm(x + residual) * weight + bias. Grid: row tiles."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_col = tl.arange(0, BLOCK)
    m_row, m_col = o_row < rows, o_col < SIZE
    m_x = m_row[:, None] & m_col[None, :]
    o_x = o_row[:, None] * SIZE + o_col[None, :]  # [ROWS, BLOCK]
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    if p_residual is not None:
        b_x += tl.load(p_residual + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_total = b_x.to(p_total.dtype.element_ty)
        tl.store(p_total + o_x, b_total, mask=m_x)
        b_x = b_total.to(tl.float32)
    b_x, b_mean, b_scale = centre(b_x, m_col, eps, SIZE)
    b_weight = tl.load(p_weight + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_y = b_x * b_scale[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(p_y + o_x, b_y.to(p_y.dtype.element_ty), mask=m_x)
    tl.store(p_statistics + o_row, b_mean, mask=m_row)
    tl.store(p_statistics + rows + o_row, b_scale, mask=m_row)


@triton.jit(do_not_specialize=["rows"])
def add_norm_backward_kernel(
    p_grad_total,  # [rows, SIZE], written
    p_parts,  # fp32 [programs, 2, SIZE], written: what weight and bias get from a program's rows
    p_grad,  # [rows, SIZE]
    p_total,  # [rows, SIZE]
    p_statistics,  # fp32 [2, rows]
    p_weight,  # [SIZE]
    rows,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_col = tl.arange(0, BLOCK)
    m_col = o_col < SIZE
    b_weight = tl.load(p_weight + o_col, mask=m_col, other=0.0).to(tl.float32)
    b_to_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    b_to_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    first = tl.program_id(0) * ROWS
    while first < rows:
        o_row = (first + tl.arange(0, ROWS)).to(tl.int64)
        m_row = o_row < rows
        m_x = m_row[:, None] & m_col[None, :]
        o_x = o_row[:, None] * SIZE + o_col[None, :]  # [ROWS, BLOCK]
        b_grad = tl.load(p_grad + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_x = tl.load(p_total + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_mean = tl.load(p_statistics + o_row, mask=m_row, other=0.0)
        b_scale = tl.load(p_statistics + rows + o_row, mask=m_row, other=0.0)
        b_x = tl.where(m_x, (b_x - b_mean[:, None]) * b_scale[:, None], 0.0)  # normalised
        b_to_weight += b_grad * b_x
        b_to_bias += b_grad
        b_grad *= b_weight[None, :]
        b_along = tl.sum(b_grad * b_x, 1) / SIZE
        b_level = tl.sum(b_grad, 1) / SIZE
        b_grad = (b_grad - b_level[:, None] - b_x * b_along[:, None]) * b_scale[:, None]
        tl.store(p_grad_total + o_x, b_grad.to(p_grad_total.dtype.element_ty), mask=m_x)
        first += tl.num_programs(0) * ROWS
    p_part = p_parts + tl.program_id(0).to(tl.int64) * 2 * SIZE + o_col
    tl.store(p_part, tl.sum(b_to_weight, 0), mask=m_col)
    tl.store(p_part + SIZE, tl.sum(b_to_bias, 0), mask=m_col)


@triton.jit(do_not_specialize=["parts"])
def sum_parts_kernel(
    p_grad_weight,  # [SIZE], written
    p_grad_bias,  # [SIZE], written
    p_parts,  # fp32 [parts, 2, SIZE]
    parts,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of all parts, in the order of the programs. Grid: column tiles of both gradients, side by side."""
    o_col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m_col = o_col < 2 * SIZE
    b_sum = tl.zeros((PARTS, COLUMNS), tl.float32)
    for first in range(0, parts, PARTS):
        o_part = (first + tl.arange(0, PARTS)).to(tl.int64)
        m_part = (o_part < parts)[:, None] & m_col[None, :]
        b_sum += tl.load(p_parts + o_part[:, None] * 2 * SIZE + o_col[None, :], mask=m_part, other=0.0)
    b_total = tl.sum(b_sum, 0)
    m_weight = o_col < SIZE
    tl.store(p_grad_weight + o_col, b_total.to(p_grad_weight.dtype.element_ty), mask=m_weight)
    o_bias = o_col - SIZE
    tl.store(p_grad_bias + o_bias, b_total.to(p_grad_bias.dtype.element_ty), mask=m_col & (o_bias >= 0))


def _shape(size: int, tile: int = _TILE) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    return {"ROWS": max(1, tile // block), "BLOCK": block, "num_warps": min(max(4, block // 256), 16)}


@implement("add_norm", "triton", available=triton_support.why_not)
def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, size = x.shape
    dtype = sum_dtype(x, residual)
    y = x.new_empty((rows, size), dtype=torch.promote_types(dtype, weight.dtype))
    total = x.new_empty((0 if residual is None else rows, size), dtype=dtype)
    statistics = x.new_empty((2, rows), dtype=torch.float32)
    if rows:
        shape = _shape(size)
        operands = (x.contiguous(), None if residual is None else residual.contiguous())
        with torch.cuda.device_of(x):
            add_norm_kernel[(triton.cdiv(rows, shape["ROWS"]),)](
                *(y, None if residual is None else total, statistics, *operands),
                *(weight.contiguous(), bias.contiguous(), rows, eps),
                SIZE=size,
                **shape,
            )
    return y, total, statistics


@implement("add_norm_backward", "triton", available=triton_support.why_not)
def add_norm_backward(grad: Tensor, total: Tensor, statistics: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, size = total.shape
    shape = _shape(size, _BACKWARD_TILE)
    programs = max(1, min(triton.cdiv(rows, shape["ROWS"]), _PROGRAMS * multiprocessors(total.device)))
    grad_total = torch.empty((rows, size), dtype=total.dtype, device=total.device)
    parts = torch.empty((programs, 2, size), dtype=torch.float32, device=total.device)
    with torch.cuda.device_of(total):
        add_norm_backward_kernel[(programs,)](
            *(grad_total, parts, grad.contiguous(), total.contiguous(), statistics.contiguous(), weight.contiguous()),
            rows,
            SIZE=size,
            **shape,
        )
        grad_weight, grad_bias = weight.new_empty(size), weight.new_empty(size)
        sum_parts_kernel[(triton.cdiv(2 * size, _COLUMNS),)](
            grad_weight, grad_bias, parts, programs, SIZE=size, PARTS=_PARTS, COLUMNS=_COLUMNS, num_warps=4
        )
    return grad_total, grad_weight, grad_bias


# ---- what is compiled ahead of time


def specialisations() -> Iterator[Specialisation]:
    """At the usual widths in every dtype, with a residual and without, and as under autocast."""
    types = {"p_statistics": "*fp32", "p_parts": "*fp32", "eps": "fp32"}
    for kind in DTYPE_NAMES.values():
        for size in (384, 768, 1024):
            forward, backward = {"SIZE": size, **_shape(size)}, {"SIZE": size, **_shape(size, _BACKWARD_TILE)}
            yield specialise(f"add_norm {size} {kind}", add_norm_kernel, kind, forward, types)
            yield specialise(f"add_norm {size} {kind} backward", add_norm_backward_kernel, kind, backward, types)
        tile = {"SIZE": 768, "PARTS": _PARTS, "COLUMNS": _COLUMNS, "num_warps": 4}
        yield specialise(f"add_norm 768 {kind} parts", sum_parts_kernel, kind, tile, types)
        alone = {"SIZE": 768, "p_total": None, "p_residual": None, **_shape(768)}
        yield specialise(f"add_norm 768 {kind} alone", add_norm_kernel, kind, alone, types)
    mixed = types | {"p_x": "*bf16"}
    yield specialise("add_norm 768 autocast", add_norm_kernel, "fp32", {"SIZE": 768, **_shape(768)}, mixed)
