"""docs/api.md names every public name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import transkimmer
import transkimmer.training
from transkimmer.skimming import Skimming

import transkimmer_kernels

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8")
FIELDS = [field.name for field in dataclasses.fields(transkimmer.SkimConfig)]
NAMES = {
    "transkimmer": transkimmer.__all__,
    "SkimConfig": FIELDS,
    "model.skimming": [name for name in vars(Skimming) if not name.startswith("_")],
    "SkimRecord": [name for name in dir(transkimmer.SkimRecord) if not name.startswith("_")],
    "transkimmer.training": transkimmer.training.__all__,
    "transkimmer_kernels": transkimmer_kernels.__all__,
}


@pytest.mark.parametrize("section", NAMES)
def test_every_public_name_is_on_its_page(section: str) -> None:
    _, found, text = PAGE.partition(f"\n## `{section}`\n")
    text = text.partition("\n## ")[0]
    assert found and not [name for name in NAMES[section] if not re.search(rf"`{name}\b", text)]


def test_defaults_are_those_of_the_code() -> None:
    for field in dataclasses.fields(transkimmer.SkimConfig):
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{field.name}` "))
        shown = field.default if not isinstance(field.default, str) else f'`"{field.default}"`'
        assert line.split("|")[2].strip() == str(shown)
