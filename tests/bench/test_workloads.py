"""What benchmarks run on: settings of the command line, batches, shapes, and schedules that skim as the paper's do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from transkimmer.bench import counters, setting, workload
from transkimmer.bench.workload import SCHEDULES
from transkimmer.demo import load_demo
from transkimmer.flops import EncoderShape

from ..models.tiny import tiny

PAPER = json.loads((Path(__file__).parents[2] / "benchmarks/paper.json").read_text(encoding="utf-8"))


def settings_of(*options: str) -> list[setting.Setting]:
    parser = argparse.ArgumentParser()
    setting.add_arguments(parser, many=True)
    return list(setting.settings(parser.parse_args([*options, "--device", "cpu"])))


def test_settings() -> None:
    found = settings_of("--lengths", "sst2", "--batch-size", "1", "4", "32")
    assert [(one.batch_size, one.batches) for one in found] == [(1, 16), (4, 4), (32, 4)]
    assert {one.schedule for one in found} == {"sst2"}, "that of the lengths"
    (one,) = settings_of("--lengths", "sst2", "--batch-size", "4", "--schedule", "mrpc", "--batches", "7")
    assert (one.lengths, one.schedule, one.batches, one.decisions) == ("sst2", "mrpc", 7, "synthetic")


def test_a_setting_has_the_batches_there_are(tmp_path: Path) -> None:
    """By their number, times of all are those of one."""
    tiny("bert", "sequence").save_pretrained(tmp_path)
    asked = setting.Setting(str(tmp_path), "mrpc", "1,0.6,0.2", 100, 9, "fp32", "cpu", 1)
    found, subject, batches = setting.prepare(asked, "auto")
    assert len(workload.known_lengths()["mrpc"]) == 408 and found.batches == len(batches) == 4
    assert subject.skimming.skimming.config.schedule == [1.0, 0.6, 0.2]


def test_batches_of_the_demo_have_its_own_lengths() -> None:
    _, tokenizer = load_demo()
    (batch,) = workload.demo_batches(tokenizer, 6, 1)
    assert torch.equal(batch.lengths, batch.inputs["attention_mask"].sum(1)) and batch.lengths.unique().numel() > 1


def test_shapes_are_what_they_are_called() -> None:
    shapes = {name: EncoderShape.of(config) for name, config in workload.RANDOM_SHAPES.items()}
    assert shapes == {
        "bert-base-shape": EncoderShape(12, 768, 3072),
        "bert-large-shape": EncoderShape(24, 1024, 4096),
        "e5-small-shape": EncoderShape(12, 384, 1536),
    }


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_lead_to_the_papers_speedups(name: str) -> None:
    """At the mean lengths that the paper gives."""
    length = torch.tensor([PAPER["data"][name]["tokens"]])
    layers = torch.stack([(length * SCHEDULES[name] ** (layer + 1)).round().clamp(min=1).long() for layer in range(12)])
    wanted = (PAPER["glue"]["bert"] | PAPER["long"]["bert"])[name]["speedup"]
    assert EncoderShape(12, 768, 3072, 768).flops_speedup(length, layers) == pytest.approx(wanted, rel=0.02)


def test_resident_memory_is_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "_STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("VmHWM:\t    200 kB\nVmRSS:\t    100 kB\n", encoding="ascii")
    assert (counters._resident("VmRSS"), counters._resident("VmHWM")) == (102_400, 204_800)
