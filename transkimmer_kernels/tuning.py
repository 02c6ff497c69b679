"""Which configuration a Triton kernel runs with: a measured one where a file has it, else its own default.

A configuration (tile sizes, warps, stages) is a NamedTuple of the kernel's own, chosen per *shape class*: the dtype and
sizes of the model, never a row count, so that no batch compiles a kernel anew. An operator takes part with a few lines
in its `triton.py`:

    class _Tiling(NamedTuple):  # whole numbers, fractions, words, and tuples of whole numbers
        queries: int
        keys: int
        num_warps: int
        num_stages: int

    def _default(dtype: torch.dtype, head_dim: int) -> _Tiling: ...  # from the compiler's report, see docs/kernels.md
    def _candidates(dtype: torch.dtype, head_dim: int) -> Iterator[_Tiling]: ...  # worth measuring

    TUNABLE = Tunable("ragged_attention", _default, _candidates)

    tiling = TUNABLE.config(q.device, q.dtype, head_dim)  # in the launcher: a dictionary is asked
    for tiling, target in TUNABLE.shipped(dtype, head_dim).items(): ...  # in `specialisations()`: all that may run

and with inputs of a shape class in `tune/problems.py` (attention's are there) for `python -m transkimmer_kernels.tune`.

Files are looked for by the name of the device, then by its compute capability (`nvidia_h200.json`, `sm_90.json`), in
the folder TRANSKIMMER_CONFIGS and then in `transkimmer_kernels/configs/`. A file that cannot be read, or whose fields
are not those of the kernel, is passed over with a warning.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from .triton_support import DTYPE_NAMES

PACKAGED = Path(__file__).parent / "configs"
FORMAT = 1

C = TypeVar("C", bound=tuple[Any, ...])

# (operator, device, dtype, sizes) -> configuration; emptied by `forget`.
_chosen: dict[tuple[Any, ...], Any] = {}
_forced: dict[str, Any] = {}


def shape_class(dtype: torch.dtype, *sizes: int) -> str:
    """The key of a shape class in a file: "bf16 768 3072"."""
    return " ".join([DTYPE_NAMES[dtype], *map(str, sizes)])


@dataclass(frozen=True)
class Tunable(Generic[C]):
    """What of an operator's kernel can be tuned.

    operator: its folder under ops/, and its section in the files.
    default: (dtype, *sizes) -> the configuration without a measurement.
    candidates: (dtype, *sizes) -> configurations worth measuring; which of them compile, measuring shows.
    """

    operator: str
    default: Callable[..., C]
    candidates: Callable[..., Iterable[C]]

    def config(self, device: torch.device, dtype: torch.dtype, *sizes: int) -> C:
        """For a launch on this device; the first call per shape class reads files, later ones a dictionary."""
        if self.operator in _forced:
            return _forced[self.operator]
        key = (self.operator, device, dtype, sizes)
        found = _chosen.get(key)
        if found is None:
            found = _chosen[key] = self._measured(files(device), dtype, sizes) or self.default(dtype, *sizes)
        return found

    def shipped(self, dtype: torch.dtype, *sizes: int) -> dict[C, str | None]:
        """Every configuration that this package may choose for the class, and where.

        The default, anywhere (None), and those that were measured, for that compute capability ("sm_90").
        """
        found: dict[C, str | None] = {self.default(dtype, *sizes): None}
        for path in sorted(PACKAGED.glob("*.json")):
            measured = self._measured([path], dtype, sizes)
            if measured is not None:
                found.setdefault(measured, _document(path).get("capability"))
        return found

    def _measured(self, paths: list[Path], dtype: torch.dtype, sizes: tuple[int, ...]) -> C | None:
        key = shape_class(dtype, *sizes)
        for path in paths:
            entry = _read(path).get(self.operator, {}).get(key)
            if entry is None:
                continue
            try:
                return self.decode(entry["config"], dtype, *sizes)
            except (KeyError, TypeError, ValueError) as error:
                warnings.warn(f"{path}, {self.operator}, {key}: {error}; the default is used", stacklevel=2)
        return None

    def decode(self, stored: dict[str, Any], dtype: torch.dtype, *sizes: int) -> C:
        """A configuration from its form in a file; ValueError where it does not have the kernel's fields and kinds."""
        default: Any = self.default(dtype, *sizes)
        fields = default._asdict()
        if set(stored) != set(fields):
            raise ValueError(f"expected the fields {', '.join(fields)}, got {', '.join(stored)}")
        return type(default)(**{name: _as(name, stored[name], like) for name, like in fields.items()})


def _as(name: str, value: Any, like: Any) -> Any:
    """`value` in the kind of `like`."""
    if isinstance(like, tuple) and isinstance(value, list) and len(value) == len(like):
        return tuple(_as(name, part, whole) for part, whole in zip(value, like, strict=True))
    if isinstance(like, float) and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(like):
        raise ValueError(f"{name}: expected something like {like!r}, got {value!r}")
    return value


@functools.cache
def file_names(device: torch.device) -> tuple[str, ...]:
    """The files for a device, the most specific first; none for the interpreter's."""
    if device.type != "cuda":
        return ()
    properties = torch.cuda.get_device_properties(device)
    return f"{slug(properties.name)}.json", f"sm_{properties.major}{properties.minor}.json"


def slug(device_name: str) -> str:
    """ "NVIDIA H200" -> "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


def why_not_own() -> str | None:
    """What is wrong with TRANSKIMMER_CONFIGS; None where it is not set or names a folder."""
    own = os.environ.get("TRANSKIMMER_CONFIGS")
    return f"TRANSKIMMER_CONFIGS={own} is not a folder" if own and not Path(own).is_dir() else None


def folders() -> list[Path]:
    own = os.environ.get("TRANSKIMMER_CONFIGS")
    if (reason := why_not_own()) is not None:
        warnings.warn(f"{reason}; only the package's configurations are used", stacklevel=2)
    return [Path(own), PACKAGED] if own else [PACKAGED]


def files(device: torch.device) -> list[Path]:
    """Those there are for a device, in the order in which they are asked."""
    return [path for folder in folders() for name in file_names(device) if (path := folder / name).is_file()]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """operator -> shape class -> entry; empty where the file cannot be used."""
    return _document(path).get("operators", {})


@functools.cache
def _document(path: Path) -> dict[str, Any]:
    """What a file holds; empty where it cannot be used."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}, expected {FORMAT}")
        return document | {"operators": {name: dict(entries) for name, entries in document["operators"].items()}}
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        warnings.warn(f"{path}: {error}; the defaults are used", stacklevel=2)
        return {}


def forget() -> None:
    """Makes the next launch look at the files again."""
    _chosen.clear()
    _document.cache_clear()


@contextmanager
def forced(operator: str, config: Any) -> Iterator[None]:
    """Inside, every launch of the operator's kernel runs with `config`, whatever its shape class; for measuring."""
    _forced[operator] = config
    try:
        yield
    finally:
        del _forced[operator]
