"""Every Triton kernel in every shipped configuration compiles for every target, and well: no GPU is needed."""

from __future__ import annotations

import pytest

from transkimmer_kernels import aot, triton_support
from transkimmer_kernels.triton_support import Specialisation, specialise

# Before the kernels are listed below, which imports them.
if (REASON := triton_support.why_not_importable()) is not None:
    pytest.skip(REASON, allow_module_level=True)
if triton_support.interpreted():
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)

import triton
import triton.language as tl


def test_every_operator_with_triton_kernels_lists_them() -> None:
    """That each kernel is among them: test_specialisation.py, which sees what is launched."""
    listed = {folder for folder, _ in aot.kernels()}
    assert listed >= {"compact", "ragged_attention", "ragged_linear", "rows", "skim_logit"}
    assert listed >= {"add_norm", "choose_rows", "embed_tokens"}
    names = [entry.name for _, entry in aot.kernels()]
    assert len(names) == len(set(names)), "names tell the configurations apart"


@pytest.mark.parametrize("operator", sorted({folder for folder, _ in aot.kernels()}))
@pytest.mark.parametrize("target", aot.TARGETS)
def test_no_spills_shared_memory_fits_and_matrix_instructions(target: str, operator: str) -> None:
    """One process, as the tests run side by side; `encoder_layer` and the like have no kernels of their own."""
    reports = aot.compile_all([target], [operator], jobs=1)
    assert not {f"{r.kernel} {r.target}": r.problems for r in reports if r.problems}


def test_problems_are_found() -> None:
    """A matrix product without matrix instructions: fp32 in full precision has none."""
    entry = next(entry for _, entry in aot.kernels() if entry.matmul)
    signature = {name: kind.replace("bf16", "fp32").replace("fp16", "fp32") for name, kind in entry.signature.items()}
    plain = Specialisation(**{**vars(entry), "signature": signature})
    assert "no matrix instruction" in aot.compile_kernel(plain, "sm_90").problems


@triton.jit
def _plain(p_x, p_y, p_slots, rows, row_stride, eps, SIZE: tl.constexpr):
    pass


def test_a_specialisation_follows_from_the_keywords_of_a_launch() -> None:
    types = {"p_slots": "*i32", "p_y": "*u8", "eps": "fp32", "batch": "i64"}
    signature = {"p_x": "*bf16", "p_slots": "*i32", "rows": "i32", "row_stride": "i32", "eps": "fp32"}
    aligned = ("p_x", "p_slots", "row_stride")
    keywords = {"p_y": None, "SIZE": 64, "num_warps": 8, "maxnreg": 255}
    found = specialise("plain", _plain, "bf16", keywords, types, matmul=True, target="sm_90")
    constants = {"p_y": None, "SIZE": 64}
    assert found == Specialisation("plain", _plain, signature, constants, aligned, 8, 3, True, 255, "sm_90")
    assert specialise("plain", _plain, "bf16", {"SIZE": 64, "num_stages": 2}, types).num_stages == 2
