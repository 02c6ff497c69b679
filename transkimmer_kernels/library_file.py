"""What a file of native kernels says about itself, read without loading it: loading the wrong one may end the process.

Every kernel library carries a line of text (csrc/include/transkimmer/interface.h) that names its kind, the interface
between it and these Python files, and the GPU architectures that it holds code for.
"""

from __future__ import annotations

import mmap
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# As in csrc/include/transkimmer/interface.h; it changes whenever a registered name or signature does.
INTERFACE = 1

_TEXT = re.compile(rb"transkimmer kernels: (cpu|cuda); interface (\d+); architectures ([^;]*);")
_ARCHITECTURE = re.compile(r"(\d+)(\d)([af]?)-(real|virtual)")


@dataclass(frozen=True)
class LibraryFile:
    """kind: "cpu" or "cuda"; architectures: in CMake's spelling, such as "80-real 90a-real 100-virtual"."""

    kind: str
    interface: int
    architectures: str

    @classmethod
    def read(cls, path: Path) -> LibraryFile | None:
        """None for a file that is no kernel library of this project."""
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return None
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = _TEXT.search(data)
                texts = found and [text.decode() for text in found.groups()]
        return cls(texts[0], int(texts[1]), texts[2]) if texts else None

    def serves(self, capability: tuple[int, int]) -> bool:
        """Whether a device of this compute capability runs the code: compiled for it, or to be compiled from PTX.

        Compiled code serves its own major version from its own minor version on, and with an `a` no other device.
        """
        for major, minor, suffix, kind in _ARCHITECTURE.findall(self.architectures):
            wanted = int(major), int(minor)
            if suffix == "a":
                served = capability == wanted
            elif suffix == "f" or kind == "real":
                served = capability[0] == wanted[0] and capability[1] >= wanted[1]
            else:
                served = capability >= wanted
            if served:
                return True
        return False


def why_not_loadable(kind: str, path: Path) -> str:
    """The reason not to load `path` as the library of this kind, or an empty string."""
    try:
        if reason := _why_not_here(path):
            return reason
        file = LibraryFile.read(path)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if file is None:
        return f"{path} is not a kernel library of transkimmer"
    if file.kind != kind:
        return f"{path} is a {file.kind} library, wanted is a {kind} one"
    if file.interface != INTERFACE:
        return f"{path} has interface {file.interface}, this package {INTERFACE}: rebuild it (docs/building.md)"
    return ""


def _why_not_here(path: Path) -> str:
    """Why an ELF file is not whole or not for this kind of processor. Other formats are left to the loader."""
    with path.open("rb") as file, Path(sys.executable).open("rb") as own:
        header, ours = file.read(64), own.read(64)
    if not header.startswith(b"\x7fELF") or not ours.startswith(b"\x7fELF"):
        return ""
    if len(header) < 64:
        return f"{path} is cut short"
    # Class and byte order, machine.
    if header[4:6] != ours[4:6] or header[18:20] != ours[18:20]:
        return f"{path} was built for another processor"
    sections = int.from_bytes(header[40:48], sys.byteorder)
    end = sections + int.from_bytes(header[58:60], sys.byteorder) * int.from_bytes(header[60:62], sys.byteorder)
    return f"{path} is cut short" if path.stat().st_size < end else ""
