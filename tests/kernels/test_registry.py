"""Which backend is chosen, what is said where none can be, and that the suite cannot pass by skipping."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from transkimmer_kernels import KERNELS, BackendUnavailable, KernelSet, cpu_products, env, native, registry
from transkimmer_kernels.library import BACKENDS, OPERATORS
from transkimmer_kernels.registry import select_backend, table, why_not

from ..target import EMULATION, Target, required_backends, skip


@pytest.fixture
def availability(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str | None]]:
    """Backend -> reason (None: works) for `compact`, to be edited by a test."""
    state: dict[str, str | None] = dict.fromkeys(BACKENDS)
    patched = {backend: lambda backend=backend: state[backend] for backend in BACKENDS}
    monkeypatch.setattr(OPERATORS["compact"], "backends", patched)
    monkeypatch.delenv("TRANSKIMMER_KERNELS", raising=False)
    select_backend.cache_clear()
    yield state
    select_backend.cache_clear()


@pytest.mark.parametrize(
    ("kernels", "device", "broken", "chosen"),
    [
        ("auto", "cpu", (), "cpu"),
        ("auto", "cpu", ("cpu",), "reference"),
        ("auto", "cuda", (), "cuda"),
        ("auto", "cuda", ("cuda",), "triton"),
        ("auto", "cuda", ("cuda", "triton"), "reference"),
        ("auto", "meta", (), "reference"),
        ("cpu", "cpu", (), "cpu"),
        ("triton", "cpu", (), "triton"),
        ("triton", "cuda", (), "triton"),
        ("cuda", "cuda", (), "cuda"),
        ("cuda", "cuda", ("cuda",), "triton"),
        ("reference", "cuda", (), "reference"),
        ("reference", "cpu", (), "reference"),
    ],
)
def test_preference(
    availability: dict[str, str | None], kernels: str, device: str, broken: tuple[str, ...], chosen: str
) -> None:
    availability.update(dict.fromkeys(broken, "the library is missing"))
    assert select_backend("compact", kernels, device) == chosen


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [(torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float16, "reference"), (torch.float64, "reference")],
)
def test_dtypes_without_native_kernels_are_left_to_the_reference(
    availability: dict[str, str | None], dtype: torch.dtype, chosen: str
) -> None:
    assert select_backend("compact", "auto", "cpu", dtype) == chosen


def test_the_environment_says_what_auto_means(
    availability: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSKIMMER_KERNELS", "triton")
    assert select_backend("compact", "auto", "cpu") == "triton"
    assert select_backend("compact", "reference", "cpu") == "reference"
    availability["triton"] = "the library is missing"
    select_backend.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"^TRANSKIMMER_KERNELS='triton' .* cannot run compact"):
        select_backend("compact", "auto", "cpu")
    monkeypatch.setenv("TRANSKIMMER_KERNELS", "cuda")
    select_backend.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"^TRANSKIMMER_KERNELS='cuda' .* unset TRANSKIMMER_KERNELS$"):
        select_backend("compact", "auto", "cpu")
    monkeypatch.setenv("TRANSKIMMER_KERNELS", "")
    select_backend.cache_clear()
    assert select_backend("compact", "auto", "cpu") == "cpu"
    monkeypatch.setenv("TRANSKIMMER_KERNELS", "fastest")
    select_backend.cache_clear()
    with pytest.raises(ValueError, match=r"^TRANSKIMMER_KERNELS='fastest': must be one of auto, reference"):
        select_backend("compact", "auto", "cpu")


@pytest.mark.parametrize(("kernels", "device"), [("cpu", "cpu"), ("triton", "cuda"), ("triton", "cpu")])
def test_named_backend_never_falls_back(availability: dict[str, str | None], kernels: str, device: str) -> None:
    availability[kernels] = "the library is missing"
    with pytest.raises(BackendUnavailable) as caught:
        select_backend("compact", kernels, device)
    for part in (f"kernels={kernels!r}", "compact", repr(device), f"{kernels}: the library is missing"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("kernels", "device"), [("cpu", "cuda"), ("cuda", "cpu"), ("cpu", "meta")])
def test_device_not_served(kernels: str, device: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"^kernels='{kernels}' does not serve tensors on '{device}'"):
        KernelSet(kernels, device)


def test_unknown_kernels() -> None:
    for build in (lambda: KernelSet("fast", "cpu"), lambda: select_backend("compact", "fast", "cpu")):
        with pytest.raises(ValueError, match=r"^kernels='fast': must be one of auto, reference, cpu, triton, cuda"):
            build()


def test_kernel_set_serves_every_operator(target: Target) -> None:
    target.require(*OPERATORS)
    kernels = KernelSet(target.backend, target.device)
    assert kernels.serves == dict.fromkeys(OPERATORS, target.backend)
    for name in OPERATORS:
        assert getattr(kernels, name) is OPERATORS[name].overload(target.backend)
    with pytest.raises(AttributeError, match="no operator 'conv'"):
        _ = kernels.conv


def test_packed_weight_multiplies_alike(target: Target) -> None:
    """A backend's own form of a matrix is for its operators only, and changes nothing but the order of sums."""
    target.require(*OPERATORS)
    kernels = KernelSet(target.backend, target.device)
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = (torch.randn(9, 32, device=target.device, dtype=dtype) for _ in range(2))
        cu_seqlens = torch.tensor([0, 7], dtype=torch.int32, device=target.device)
        bias = torch.randn(9, device=target.device, dtype=dtype)
        y, packed = (
            kernels.ragged_linear(x, w, bias, cu_seqlens, None, "gelu")[:7]
            for w in (weight, kernels.pack_weight(weight))
        )
        torch.testing.assert_close(packed, y)


def test_table_tells_every_reason() -> None:
    rows = dict(table())
    assert list(rows) == list(OPERATORS)
    for name, row in rows.items():
        assert tuple(row) == BACKENDS
        assert row["reference"] == "available"
        for backend in BACKENDS:
            reason = why_not(OPERATORS[name], backend)
            assert reason is None or reason.strip(), "a backend that is missing must say why"
            assert row[backend] == ("available" if reason is None else reason)


def test_required_backend_fails_instead_of_skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSKIMMER_REQUIRE_BACKENDS", "reference, cpu")
    with pytest.raises(pytest.fail.Exception, match=r"cpu is required .* the library is missing"):
        skip("cpu", "the library is missing")
    with pytest.raises(pytest.skip.Exception, match="triton: the library is missing"):
        skip("triton", "the library is missing")
    monkeypatch.setenv("TRANSKIMMER_REQUIRE_BACKENDS", "cpu,emulation")
    with pytest.raises(pytest.fail.Exception, match=r"emulation is required .* it is not built"):
        skip(EMULATION, "it is not built")
    monkeypatch.setenv("TRANSKIMMER_REQUIRE_BACKENDS", "cpus")
    with pytest.raises(pytest.UsageError, match=r"unknown \['cpus'\]"):
        required_backends()


def test_an_operator_without_a_kernel_may_be_skipped_for_cuda_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSKIMMER_REQUIRE_BACKENDS", "cpu,cuda")
    monkeypatch.setattr(OPERATORS["compact"], "backends", {})
    with pytest.raises(pytest.skip.Exception, match="cuda: no cuda kernel for compact"):
        Target("cuda", "cuda").require("compact")
    with pytest.raises(pytest.fail.Exception, match="cpu is required"):
        Target("cpu", "cpu").require("compact")
    monkeypatch.setattr(OPERATORS["compact"], "backends", {"cuda": lambda: "the library is missing"})
    with pytest.raises(pytest.fail.Exception, match=r"cuda is required .* the library is missing"):
        Target("cuda", "cuda").require("compact")


# What Linux calls the features that each instruction set of the CPU library takes.
AVX512 = {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
FLAGS = {"avx2": {"avx2", "fma"}, "avx512": AVX512, "avx512bf16": AVX512 | {"avx512_bf16"}}


@pytest.mark.skipif(bool(os.environ.get("TRANSKIMMER_CPU_ISA")), reason="TRANSKIMMER_CPU_ISA names the instruction set")
def test_the_best_instruction_set_that_linux_lists_is_chosen() -> None:
    if not (entry := native.status()["cpu"]).loaded:
        skip("cpu", entry.reason)
    listed = set(env.cpuinfo().get("flags", "").split())
    if not listed:
        pytest.skip("/proc/cpuinfo lists no flags")
    built = native.build_info().get("isa_flags", "")
    names = [name for name, flags in FLAGS.items() if flags <= listed and (not built or f"{name}: " in built)]
    assert cpu_products.instruction_set() == ["generic", *names][-1]


def test_the_measured_forms_are_of_instruction_sets_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong name would be timed in silence, in every process."""
    assert {isa for isa, _ in cpu_products._MEASURED} <= set(FLAGS)
    choose = cpu_products.choose_form.__wrapped__
    monkeypatch.delenv("TRANSKIMMER_CPU_PRODUCTS", raising=False)
    monkeypatch.setattr(cpu_products, "faster_form", lambda dtype, forms: f"timed: {', '.join(forms)}")
    found = {}
    for packs in (True, False):
        monkeypatch.setattr(cpu_products.onednn, "can_pack", lambda dtype, packs=packs: packs)
        for isa in ("generic", *FLAGS):
            monkeypatch.setattr(cpu_products, "instruction_set", lambda isa=isa: isa)
            found[isa, packs] = tuple(choose(dtype) for dtype in (torch.float32, torch.bfloat16))
    timed = "timed: panels, onednn, plain"
    expected = {"generic": (timed, timed), "avx2": ("panels", "onednn"), "avx512": (timed, timed)}
    expected["avx512bf16"] = ("panels", "panels")
    assert {isa: found[isa, True] for isa in expected} == expected
    without = {isa: found[isa, False] for isa in expected}
    assert without["avx2"] == without["avx512bf16"] == ("panels", "panels")
    assert without["generic"] == without["avx512"] == ("timed: panels, plain",) * 2


def test_names() -> None:
    assert list(KERNELS) == ["auto", *BACKENDS]
    assert sorted(registry._PREFERENCES) == sorted(KERNELS)
