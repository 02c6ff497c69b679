"""What the operators' FLOP formulas are made of.

`torch.utils.flop_counter.FlopCounterMode` asks an operator's formula after the operator has run; only then are offsets
read on the host. Counted are the matrix products that the contract asks for, on the rows that the offsets name and on
nothing else, alike for every backend: rounding up to tiles, and rows computed for nothing, are no FLOPs. A multiply-add
is 2 of them; biases, softmax, LayerNorm, GELU and the importance of keys are not counted.
"""

from __future__ import annotations

from torch import Tensor


def _has_values(cu_seqlens: Tensor) -> bool:
    from torch._subclasses.fake_tensor import is_fake  # takes a second to import, and only who counts needs it

    return not is_fake(cu_seqlens) and cu_seqlens.device.type != "meta"


def row_count(cu_seqlens: Tensor, capacity: int) -> int:
    """Listed rows; of a fake tensor, which has no values, as many as there could be (as PyTorch's formulas do)."""
    return int(cu_seqlens[-1]) if _has_values(cu_seqlens) else capacity


def sequence_count(cu_seqlens: Tensor) -> int:
    """Sequences that are not empty; of a fake tensor, all of them."""
    return int((cu_seqlens.diff() > 0).sum()) if _has_values(cu_seqlens) else cu_seqlens.numel() - 1


def pair_count(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, capacity_q: int, max_seqlen_k: int) -> int:
    """Pairs of a query and a key of its sequence; of fake tensors, as many as there could be."""
    if not (_has_values(cu_seqlens_q) and _has_values(cu_seqlens_k)):
        return capacity_q * max_seqlen_k
    return int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff().long()).sum())


def product_flops(rows: int, weight: Tensor) -> int:
    """FLOPs of multiplying `rows` rows by a weight [out, in], packed or not."""
    return 2 * rows * weight.size(0) * weight.size(1)
