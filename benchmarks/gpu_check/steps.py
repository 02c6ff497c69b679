"""The steps of the check, in order, and why a step cannot run on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import readings

CHECK = "benchmarks.gpu_check"


@dataclass(frozen=True)
class Step:
    """One process.

    command: `{folder}` in it stands for the step's own folder; read: what the files in that folder and the log say,
    see `readings`; reason: why the step is skipped; alone: whether it takes times, so that nothing may run beside it.
    """

    name: str
    purpose: str
    command: Sequence[str]
    limit_s: float
    read: Callable[[Path, str], readings.Reading] = readings.nothing
    reason: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False


def environment_step() -> Step:
    code = (
        "import json, pathlib; from transkimmer_kernels.env import report; "
        "pathlib.Path('{folder}/environment.json').write_text(json.dumps(report()))"
    )
    command = (sys.executable, "-c", code)
    return Step("environment", "what is installed, built and loaded", command, 60, readings.environment)


def steps(environment: Mapping[str, Any] | None) -> list[Step]:
    """Every step behind it; `environment`: the report of `transkimmer_kernels.env`, None where it could not be made."""
    missing = _why_no_device(environment)
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml={folder}/junit.xml")
    # Compiling a kernel takes a core for seconds: several processes share the work, and Triton's cache on disk.
    processes = str(min(12, os.cpu_count() or 1))
    parallel = ("-n", processes) if importlib.util.find_spec("xdist") else ()
    required = backends_to_require(environment)

    def tests(name: str, purpose: str, limit_s: float, wanted: Sequence[str], *arguments: str) -> Step:
        variables = {"TRANSKIMMER_REQUIRE_BACKENDS": ",".join(wanted)}
        return Step(name, purpose, (*pytest, *arguments), limit_s, readings.junit, missing, variables)

    def benchmark(operator: str, limit_s: float) -> Step:
        file = f"benchmarks/kernels/test_{operator}.py"
        command = (*pytest, "--benchmark-json={folder}/benchmark.json", "--benchmark-quiet", file)
        purpose = "time against the alternatives, each result checked first"
        return Step(f"benchmark {operator}", purpose, command, limit_s, readings.benchmark, missing, alone=True)

    return [
        tests(
            "conformance",
            "every operator x backend x dtype x awkward batch, on the device",
            200,
            required,
            *("tests/ops", "tests/kernels", "-k", "cuda and not reference_cuda", *parallel),
        ),
        *(
            # A whole model needs every operator, and `cuda` leaves some to `triton`.
            tests(name, purpose, 90, required if "triton" in required else (), f"tests/gpu/test_{name}.py")
            for name, purpose in WHOLE_MODELS.items()
        ),
        _sanitizer("memcheck", missing, 100),
        _sanitizer("racecheck", missing, 100),
        *(benchmark(operator, limit) for operator, limit in BENCHMARKS.items()),
    ]


# Module under tests/gpu/ -> what it shows.
WHOLE_MODELS = {
    "invariants": "training == pruned inference == dense when nothing is skimmed",
    "sync": "an inference forward never waits for the device",
    "graphs": "a captured forward follows lengths and masks, and equals the eager one",
    "replay": "1000 replays of a model's own graph equal eager; one launch, no waiting",
    "training_graphs": "graphed training steps have the gradients of eager ones",
}
# Module under benchmarks/kernels/ -> seconds it may take.
BENCHMARKS = {
    **{"compact": 30, "embed_tokens": 20, "training_rows": 20, "skim_logit": 60},
    **{"linear": 80, "attention": 90},
}


def _sanitizer(tool: str, missing: str, limit_s: float) -> Step:
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    command = [program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "3", "--print-limit", "20"]
    return Step(
        name=tool,
        purpose="every operator once per dtype under compute-sanitizer",
        command=(*command, sys.executable, "-m", f"{CHECK}.each_operator"),
        limit_s=limit_s,
        read=readings.sanitizer,
        reason=missing or ("" if program else "compute-sanitizer was not found"),
        # Blocks of the caching allocator are larger than the tensors in them, and would hide an overrun.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def _why_no_device(environment: Mapping[str, Any] | None) -> str:
    if environment is None:
        return "the environment report could not be made"
    gpu = environment["machine"]["gpu"]
    return "" if isinstance(gpu, list) else f"no GPU: {gpu}"


def backends_to_require(environment: Mapping[str, Any] | None) -> list[str]:
    """Backends for the device that serve what they are meant to here; a test of theirs must not be skipped.

    `cuda` has kernels for some operators and leaves the others to `triton`; `triton` has to serve all of them.
    """
    operators = {} if environment is None else environment["operators"]
    triton = bool(operators) and all(row["triton"] == "available" for row in operators.values())
    cuda = any(row["cuda"] == "available" for row in operators.values())
    return [name for name, there in (("triton", triton), ("cuda", cuda)) if there]
