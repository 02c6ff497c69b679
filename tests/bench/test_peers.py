"""benchmarks/peers.py on a tiny model: nobody is dropped silently, nobody is timed for wrong logits."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transkimmer.bench import workload
from transkimmer.bench.contenders import KEEP_ALL, PADDED, PLAIN, SKIMMING

from ..models.tiny import VOCABULARY, tiny

ARGUMENTS = Namespace(lengths="mrpc", dtype="fp32", compile=False, repeats=1)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", Path(__file__).parents[2] / "benchmarks" / "peers.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "peers", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _batches() -> list[workload.Batch]:
    return workload.random_batches([9, 4, 14, 6], 2, 2, VOCABULARY)


def test_every_peer_has_a_row(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = peers.Peer("absent", ("no-such-package",), ("fp32",), lambda *_: pytest.fail("built"))
    other = peers.Peer("other dtype", (), ("bf16",), lambda *_: pytest.fail("built"))
    present = peers.Peer("present", (), ("fp32",), lambda model, *_: tiny_logits)
    monkeypatch.setattr(peers, "PEERS", (absent, other, present, peers.COMPILED))
    dense = tiny("bert", "sequence")

    def tiny_logits(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return dense(**inputs).logits

    rows = {row.name: row for row in peers.compare(tiny("bert", "sequence"), _batches(), ARGUMENTS)}
    names = [PADDED, "absent", "other dtype", "present", peers.COMPILED.name, PLAIN, KEEP_ALL, SKIMMING]
    assert list(rows) == names
    assert rows["absent"].to_dict() == {"name": "absent", "note": rows["absent"].note}
    assert rows["absent"].note == "not installed: pip install no-such-package"
    assert rows["other dtype"].note == "timed in bf16 only"
    assert rows[peers.COMPILED.name].note == "not asked for: --compile"
    for name in (PADDED, "present", PLAIN, KEEP_ALL, SKIMMING):
        assert rows[name].note is None and rows[name].median_s > 0
    assert rows["present"].logits_error < 1e-6 < rows[SKIMMING].logits_error
    assert rows[KEEP_ALL].speed == 1.0
    assert peers.table_of(list(rows.values()), "").row_count == len(names)


@pytest.mark.parametrize("mistake", ["no mask", "nan"])
def test_wrong_logits_are_not_timed(peers: ModuleType, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    dense = tiny("bert", "sequence")

    def wrong(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if mistake == "no mask":
            return dense(inputs["input_ids"]).logits
        return dense(**inputs).logits * float("nan")

    monkeypatch.setattr(peers, "PEERS", (peers.Peer("wrong", (), ("fp32",), lambda *_: wrong),))
    with pytest.raises(ValueError, match=r"^wrong: logits differ"):
        peers.compare(tiny("bert", "sequence"), _batches(), ARGUMENTS)
