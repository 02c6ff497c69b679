"""Loads the compiled kernel libraries, and says for each of them why it is not loaded.

Nothing here raises: a package without compiled libraries, a torch without CUDA or a broken file leave the
Python backends usable, and the reason is what `python -m transkimmer_kernels.env` and the registry show.

Environment variables, read when :func:`load` first runs:

* ``TRANSKIMMER_DISABLE_NATIVE=1`` loads nothing.
* ``TRANSKIMMER_LIBRARY=path`` loads that file in place of the packaged CUDA library, even where torch sees no
  GPU; a file whose name contains ``cpu`` takes the place of the CPU library instead.
"""

import functools
import importlib
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from .library_file import LibraryFile, why_not_loadable

_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_lock = threading.Lock()
_status: dict[str, "NativeStatus"] = {}


@dataclass(frozen=True)
class NativeStatus:
    """What became of one native library. `reason` says why it is not loaded and is empty when it is.

    named: whether TRANSKIMMER_LIBRARY put the file in the place of the packaged one.
    """

    name: str
    path: Path
    loaded: bool
    reason: str = ""
    named: bool = False


def load() -> None:
    """Loads the CPU library and, where torch sees a CUDA device, the CUDA library. Later calls do nothing."""
    with _lock:
        if not _status:
            _status.update({name: _load(name) for name in ("cpu", "cuda")})


def status() -> dict[str, NativeStatus]:
    """One entry each for `"cpu"` and `"cuda"`; loads the libraries if that has not happened yet."""
    load()
    return dict(_status)


def why_not(name: str) -> str | None:
    """None if library `name` is loaded and its kernels run on every visible device, else the reason."""
    if not (entry := status()[name]).loaded:
        return entry.reason
    return _why_not_on_devices(entry.path) or None if name == "cuda" else None


def named_in_vain(name: str) -> str | None:
    """Why the library that TRANSKIMMER_LIBRARY names for backend `name` is not loaded; None where nothing is wrong.

    Somebody who names a file wants to run it: to fall back on other kernels would hide that it does not run.
    """
    entry = status().get(name)
    if entry is None or not entry.named or entry.loaded or _disabled():
        return None
    return entry.reason


def _disabled() -> bool:
    return os.environ.get("TRANSKIMMER_DISABLE_NATIVE", "0").lower() not in ("", "0", "off", "false")


@functools.cache
def _why_not_on_devices(path: Path) -> str:
    """Asked when kernels are chosen, not when the library is loaded: to ask a device its name initialises CUDA."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device" if torch.version.cuda else "torch was built without CUDA"
    file = LibraryFile.read(path)
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if file is not None and not file.serves(capability):
            kind = "sm_{}{}".format(*capability)
            return f"{path.name} holds kernels for {file.architectures}, not for CUDA device {device} ({kind})"
    return ""


def build_info() -> dict[str, str]:
    """How the native code was built (versions, architectures, flags), as the `_native` module recorded it.

    Where that module is missing or belongs to another Python, the only entry is `"unavailable"`: the reason.
    """
    try:
        module = importlib.import_module("transkimmer_kernels._native")
    except ImportError as error:
        return {"unavailable": f"{error} (Python {sys.version_info.major}.{sys.version_info.minor})"}
    return dict(module.build_info())


def _requested(name: str) -> Path | None:
    """The file that TRANSKIMMER_LIBRARY puts in the place of library `name`, if it does."""
    path = Path(os.environ.get("TRANSKIMMER_LIBRARY", "")).expanduser().absolute()
    wanted = "cpu" if "cpu" in path.name else "cuda"
    return path if os.environ.get("TRANSKIMMER_LIBRARY") and name == wanted else None


def _load(name: str) -> NativeStatus:
    requested = _requested(name)
    path = requested or Path(__file__).resolve().parent / f"libtranskimmer_{name}{_SUFFIX}"
    reason = _why_not(name, path, requested is not None)
    if not reason:
        try:
            torch.ops.load_library(str(path))
        except (OSError, RuntimeError) as error:
            # torch's own message only repeats the path; the linker's, which says what is wrong, is its cause.
            reason = str(error.__cause__ or error).strip() or type(error).__name__
    return NativeStatus(name, path, not reason, reason, requested is not None)


def _why_not(name: str, path: Path, requested: bool) -> str:
    """The reason not to try `path` at all, or an empty string."""
    if _disabled():
        return "disabled by TRANSKIMMER_DISABLE_NATIVE"
    if requested:
        return why_not_loadable(name, path) if path.is_file() else f"TRANSKIMMER_LIBRARY={path} is not a file"
    if not path.is_file():
        tools = "nvcc" if name == "cuda" else "a C++ compiler, cmake and ninja"
        return f"{path.name} was not built; that takes {tools} at install time (docs/building.md)"
    # Not `is_available`, which initialises the driver: a process that is forked later could not use it any more.
    if name == "cuda" and torch.cuda.device_count() == 0:
        return "torch sees no CUDA device" if torch.version.cuda else "torch was built without CUDA"
    return why_not_loadable(name, path)
