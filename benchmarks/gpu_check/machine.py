"""What the results were had with: device, driver, versions, commit."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def facts(environment: Mapping[str, Any] | None) -> dict[str, Any]:
    """date, commit, device (None without one) and versions, for the document."""
    versions = dict(environment["versions"]) if environment else {}
    if environment:
        versions["torch_cuda"] = environment["machine"]["torch_cuda"]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device(environment),
        "versions": versions,
    }


def commit() -> str:
    """Of the checkout, marked where it has changes; GPU_CHECK_COMMIT where the files came without their history."""
    named = os.environ.get("GPU_CHECK_COMMIT")
    if named:
        return named
    head = _output("git", "rev-parse", "HEAD")
    if not head:
        return "unknown (no git history here; GPU_CHECK_COMMIT names one)"
    return head + (" with changes" if _output("git", "status", "--porcelain") else "")


def device(environment: Mapping[str, Any] | None) -> dict[str, str] | None:
    if environment is None or not isinstance(environment["machine"]["gpu"], list):
        return None
    fields = ("name", "driver_version", "clocks.max.sm", "memory.total")
    values = (
        _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").split("\n")[0].split(", ")
    )
    known = dict(zip(fields, values, strict=False))
    return {
        "name": environment["machine"]["gpu"][0].split(",")[0],
        "description": environment["machine"]["gpu"][0],
        "driver": known.get("driver_version", "unknown"),
        "max_sm_clock": known.get("clocks.max.sm", "unknown"),
        "memory": known.get("memory.total", "unknown"),
    }


def _output(*command: str) -> str:
    """Of a command in the checkout; empty where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    return run.stdout.strip() if run.returncode == 0 else ""
