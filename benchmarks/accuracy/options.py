"""Where results and work lie, and types of options that both commands have."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from transkimmer.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/accuracy.csv"
WORK = ROOT / ".benchmarks/accuracy"  # ignored by git


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name not in {field for field in Recipe.__dataclass_fields__ if field not in ("mode", "seed")}:
        raise argparse.ArgumentTypeError(f"{text}: {name} is no setting of a recipe")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def speedup(text: str) -> float:
    value = float(text)
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number >= 1")
    return value
