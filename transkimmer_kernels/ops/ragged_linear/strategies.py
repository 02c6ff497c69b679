"""Library products behind the contract of `ragged_linear`, for devices and shapes where a table says they are faster.

* `grouped_mm`: PyTorch's product of groups of rows, with one group that ends where `cu_seqlens` does. The row count
  stays on the device; rows beyond it are not computed. bf16 only.
* `capacity`: cuBLAS on every row there is room for. Rows beyond the count are garbage, NaN perhaps, and stay so: a
  row of a product depends on no other.

Neither takes rows by slot, nor anything on the way out but `capacity` a bias. So rows are gathered by `gather_rows`
first, and what comes behind is one kernel over the rows that count, in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...triton_blocks import exact_gelu, places
from ...triton_support import DTYPE_NAMES, Specialisation, specialise
from ..rows.triton import gather_rows

_NUM_WARPS = 4


def usable(strategy: str, dtype: torch.dtype, size_out: int, size_in: int) -> bool:
    """Whether a library's product is meant, and can be had without the host reading the row count.

    Where `grouped_mm` has no kernel for a dtype or an alignment it falls back to a loop that does read it.
    """
    if strategy == "grouped_mm":
        return hasattr(F, "grouped_mm") and dtype == torch.bfloat16 and size_out % 8 == 0 and size_in % 8 == 0
    return strategy == "capacity"


def product(
    strategy: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    slots: Tensor | None,
    gelu: bool,
    residual: Tensor | None,
    residual_slots: Tensor | None,
) -> Tensor:
    """gelu(rows @ weight^T + bias) + residual: [capacity, out], undefined beyond the token count."""
    rows = x if slots is None else gather_rows(x, slots, cu_seqlens)
    if rows.size(0) == 0:
        return rows.new_empty((0, weight.size(0)))
    if strategy == "grouped_mm":
        out = F.grouped_mm(rows, weight.contiguous().t().unsqueeze(0), offs=cu_seqlens[-1:])
    else:
        out, bias = F.linear(rows, weight, bias), None
    if bias is not None or gelu or residual is not None:
        finish(out, bias, cu_seqlens, gelu, residual, residual_slots)
    return out


@triton.jit(do_not_specialize=["batch"])
def finish_kernel(
    p_y,  # [capacity, SIZE], changed
    p_bias,  # [SIZE] or None
    p_residual,  # [rows, SIZE] or None
    p_residual_slots,  # int32 [capacity] or None
    p_cu_seqlens,
    batch,
    SIZE: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[i] = gelu(y[i] + bias) + residual[residual_slots[i]] for i < cu_seqlens[batch], one row per program."""
    row = tl.program_id(0)
    if row >= tl.load(p_cu_seqlens + batch):
        return
    o_col = tl.arange(0, BLOCK)
    m_col = o_col < SIZE
    p_row = p_y + row.to(tl.int64) * SIZE + o_col
    b_y = tl.load(p_row, mask=m_col, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_col, mask=m_col, other=0.0).to(tl.float32)
    if GELU:
        b_y = exact_gelu(b_y)
    if p_residual is not None:
        place = places(p_residual_slots, row, True)
        b_y += tl.load(p_residual + place * SIZE + o_col, mask=m_col, other=0.0).to(tl.float32)
    tl.store(p_row, b_y.to(p_y.dtype.element_ty), mask=m_col)


def finish(
    y: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    gelu: bool,
    residual: Tensor | None,
    residual_slots: Tensor | None,
) -> None:
    size = y.size(1)
    with torch.cuda.device_of(y):
        finish_kernel[(y.size(0),)](
            y,
            None if bias is None else bias.contiguous(),
            residual,
            residual_slots,
            cu_seqlens.contiguous(),
            cu_seqlens.numel() - 1,
            SIZE=size,
            GELU=gelu,
            BLOCK=triton.next_power_of_2(size),
            num_warps=_NUM_WARPS,
        )


def specialisations() -> Iterator[Specialisation]:
    """What stands behind the four products of an encoder layer."""
    optional = ("p_bias", "p_residual", "p_residual_slots")
    types = {"p_residual_slots": "*i32", "p_cu_seqlens": "*i32"}
    for kind in DTYPE_NAMES.values():
        for name, size, present in (
            ("bias", 2304, ("p_bias",)),
            ("gelu", 3072, ("p_bias",)),
            ("residual", 768, optional),
        ):
            absent = dict.fromkeys(pointer for pointer in optional if pointer not in present)
            shape = {"SIZE": size, "GELU": name == "gelu", "BLOCK": triton.next_power_of_2(size)}
            keywords = {**absent, **shape, "num_warps": _NUM_WARPS}
            yield specialise(f"finish {name} {size} {kind}", finish_kernel, kind, keywords, types)
