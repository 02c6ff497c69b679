"""Environment variables at run time: shown in the report, and refused as early as a model is given skimming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transkimmer_kernels import native, tuning

from .test_packaging import _python

REPORT = "from transkimmer_kernels.env import main; main(['--json'])"
NEITHER = {"TRANSKIMMER_KERNELS": "", "TRANSKIMMER_CPU_PRODUCTS": "", "TRANSKIMMER_CPU_ISA": ""}


def _report(**environment: str) -> dict[str, dict[str, str]]:
    return json.loads(_python(REPORT, **NEITHER | environment)[0])


TRY = """
import transkimmer_kernels as tk
try:
    print(tk.kernel_set({kernels!r}, "cpu").serves["compact"])
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}")
"""


def _kernel_set(kernels: str = "auto", **environment: str) -> str:
    """What serves `compact` on a CPU, or the error, at the place where `add_skimming` asks."""
    return _python(TRY.format(kernels=kernels), **NEITHER | environment)[0].strip()


@pytest.fixture
def needs_cpu() -> None:
    if not native.status()["cpu"].loaded:
        pytest.skip(native.status()["cpu"].reason)


def test_the_report_shows_settings_and_what_they_lead_to(needs_cpu: None, tmp_path: Path) -> None:
    plain = _report()
    assert all(plain["settings"][name] == "not set" for name in NEITHER)
    assert plain["choice"]["auto on cpu"] == "cpu"
    assert plain["choice"]["cpu products, fp32"] in ("panels", "onednn", "plain")
    named = _report(TRANSKIMMER_KERNELS="reference", TRANSKIMMER_CPU_PRODUCTS="plain", TRANSKIMMER_CPU_ISA="generic")
    assert named["settings"]["TRANSKIMMER_KERNELS"] == named["choice"]["auto on cpu"] == "reference"
    assert named["choice"]["cpu products, bf16"] == "plain" and named["machine"]["cpu_kernels"] == "generic"
    bad = _report(TRANSKIMMER_KERNELS="cuda", TRANSKIMMER_CPU_PRODUCTS="best", TRANSKIMMER_CONFIGS=str(tmp_path / "no"))
    assert bad["choice"]["auto on cpu"].startswith("nothing: TRANSKIMMER_KERNELS='cuda'")
    assert bad["choice"]["cpu products, fp32"].startswith("none: TRANSKIMMER_CPU_PRODUCTS='best'")
    assert bad["machine"]["tuned"].startswith(f"TRANSKIMMER_CONFIGS={tmp_path / 'no'} is not a folder")


def test_bad_cpu_settings_are_refused_when_kernels_are_chosen(needs_cpu: None) -> None:
    assert _kernel_set() == "cpu"
    assert _kernel_set(TRANSKIMMER_CPU_PRODUCTS="best").startswith("ValueError: TRANSKIMMER_CPU_PRODUCTS='best'")
    assert _kernel_set(TRANSKIMMER_CPU_ISA="mmx").startswith("ValueError: TRANSKIMMER_CPU_ISA is 'mmx'; allowed are")


def test_a_library_named_in_vain_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "libtranskimmer_cpu.so"
    message = _kernel_set(TRANSKIMMER_LIBRARY=str(path))
    assert "BackendUnavailable: kernels='auto' cannot run" in message
    assert f"TRANSKIMMER_LIBRARY={path} is not a file" in message
    assert _kernel_set("reference", TRANSKIMMER_LIBRARY=str(path)) == "reference"
    assert _kernel_set(TRANSKIMMER_LIBRARY=str(path), TRANSKIMMER_DISABLE_NATIVE="1") == "reference"


def test_a_missing_folder_of_configurations_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSKIMMER_CONFIGS", str(tmp_path))
    assert tuning.folders() == [tmp_path, tuning.PACKAGED]
    monkeypatch.setenv("TRANSKIMMER_CONFIGS", str(tmp_path / "absent"))
    with pytest.warns(UserWarning, match=r"TRANSKIMMER_CONFIGS=.*absent is not a folder; only the package's"):
        tuning.folders()
