"""TRANSKIMMER_LIBRARY and files that do not fit: a reason in the report, never a crash. A process for each."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from transkimmer_kernels import native
from transkimmer_kernels.library_file import INTERFACE, LibraryFile, why_not_loadable

from .test_packaging import ROOT, _needs, _python

REPORT = "from transkimmer_kernels.env import main; main(['--json'])"


def _reason(path: Path, library: str = "cuda") -> str:
    """What the environment report says of `library` with TRANSKIMMER_LIBRARY=path; operators still run."""
    out, _ = _python(REPORT, TRANSKIMMER_LIBRARY=str(path))
    report = json.loads(out)
    entry = report["libraries"][library]
    assert not entry["loaded"]
    assert report["operators"]["compact"]["reference"] == "available"
    assert report["operators"]["compact"][library] == entry["reason"]
    return entry["reason"]


def _described(path: Path, kind: str = "cuda", interface: int = INTERFACE) -> Path:
    path.write_bytes(f"transkimmer kernels: {kind}; interface {interface}; architectures 80-real;".encode())
    return path


def test_a_missing_file(tmp_path: Path) -> None:
    assert _reason(tmp_path / "absent.so").endswith("absent.so is not a file")


def test_a_folder(tmp_path: Path) -> None:
    assert _reason(tmp_path).endswith("is not a file")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.so").touch()
    assert _reason(tmp_path / "empty.so").endswith("is not a kernel library of transkimmer")


def test_another_library() -> None:
    """A sound library of somebody else's, which would load and register nothing."""
    torch_library = next(Path(__import__("torch").__file__).parent.glob("lib/libtorch*"))
    assert _reason(torch_library).endswith("is not a kernel library of transkimmer")


def test_the_other_kind(tmp_path: Path) -> None:
    """The CPU library in the CUDA library's place would register everything twice, which ends the process."""
    copy = tmp_path / "kernels.so"
    copy.write_bytes(_needs("cpu").read_bytes())
    assert _reason(copy).endswith("is a cpu library, wanted is a cuda one")


def test_another_interface(tmp_path: Path) -> None:
    reason = _reason(_described(tmp_path / "old.so", interface=INTERFACE + 1))
    assert f"has interface {INTERFACE + 1}, this package {INTERFACE}: rebuild it" in reason


def test_what_only_the_loader_can_tell(tmp_path: Path) -> None:
    assert "old.so" in _reason(_described(tmp_path / "old.so"))


def test_a_file_cut_short(tmp_path: Path) -> None:
    """To map such a file and touch what is missing would end the process."""
    whole = _needs("cpu").read_bytes()
    if not whole.startswith(b"\x7fELF"):
        pytest.skip("not an ELF system")
    for size in (40, len(whole) // 2, len(whole) - 1):
        copy = tmp_path / "cpu_short.so"
        copy.write_bytes(whole[:size])
        assert _reason(copy, "cpu").endswith("is cut short")


def test_another_processor(tmp_path: Path) -> None:
    whole = bytearray(_needs("cpu").read_bytes())
    if not whole.startswith(b"\x7fELF"):
        pytest.skip("not an ELF system")
    whole[18:20] = (0x1234).to_bytes(2, "little")
    copy = tmp_path / "cpu_foreign.so"
    copy.write_bytes(whole)
    assert why_not_loadable("cpu", copy).endswith("was built for another processor")


@pytest.mark.parametrize(
    ("architectures", "served", "refused"),
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86-real", [(8, 6)], [(8, 0)]),
        ("90a-real", [(9, 0)], [(8, 9), (10, 0)]),
        ("90a-real 90a-virtual", [(9, 0)], [(10, 0)]),
        ("100-virtual", [(10, 0), (10, 3), (12, 0)], [(9, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(12, 0)]),
        ("80-real 90a-real 100-real 100-virtual", [(8, 0), (9, 0), (10, 0), (12, 1)], [(7, 0)]),
        ("", [], [(8, 0)]),
    ],
)
def test_which_devices_are_served(
    architectures: str, served: list[tuple[int, int]], refused: list[tuple[int, int]]
) -> None:
    file = LibraryFile("cuda", INTERFACE, architectures)
    assert all(file.serves(capability) for capability in served)
    assert not any(file.serves(capability) for capability in refused)


def test_a_device_that_is_not_served_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = _described(tmp_path / "kernels.so")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: [(8, 6), (9, 0)][device])
    loaded = {"cuda": native.NativeStatus("cuda", path, True)}
    monkeypatch.setattr(native, "status", lambda: loaded)
    assert native.why_not("cuda") == "kernels.so holds kernels for 80-real, not for CUDA device 1 (sm_90)"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    native._why_not_on_devices.cache_clear()
    assert native.why_not("cuda") is None
    native._why_not_on_devices.cache_clear()


def test_both_libraries_describe_themselves() -> None:
    for name in ("cpu", "cuda"):
        file = LibraryFile.read(_needs(name))
        assert file is not None
        assert (file.kind, file.interface) == (name, INTERFACE)
    assert file.architectures == native.build_info()["cuda_architectures"]


def test_the_interface_has_one_number() -> None:
    header = (ROOT / "csrc/include/transkimmer/interface.h").read_text(encoding="utf-8")
    assert re.findall(r'#define TRANSKIMMER_INTERFACE "(\d+)"', header) == [str(INTERFACE)]
