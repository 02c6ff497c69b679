"""bench model: no contender is dropped silently or timed for wrong answers, and what a row says is right."""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transkimmer.bench import counters, field, model, model_command, peers, plain, results, roofline, setting, workload
from transkimmer.bench.contenders import KEEP_ALL, PADDED, PLAIN, SKIMMING, Contender
from transkimmer.bench.timing import Limits, time_in_turn
from transkimmer.bench.workload import DTYPES
from transkimmer.cli import main
from transkimmer.flops import EncoderShape

from ..clock import Clock
from ..models.tiny import LAYERS, tiny
from .tiny_workload import LENGTHS, RATIOS, SETTING, TORCH_ONLY, batches


@pytest.fixture(autouse=True)
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not measured here: that takes seconds."""
    monkeypatch.setattr(model, "measure_ceilings", lambda device, dtype: roofline.Ceilings(1e10, 1e11))


def rows_of(subject: peers.Subject, dtype: str = "fp32", limits: Limits | None = None) -> dict[str, dict[str, object]]:
    left_out = [peer.key for peer in peers.PEERS if peer.key in ("compile", "onnx", "openvino")]
    here = replace(SETTING, dtype=dtype)
    rows = model.measure(here, subject, batches(), field.Field(left_out), 2, limits or Limits(slow=math.inf))
    return {row["contender"]: row for row in rows}


# Who is timed


@pytest.mark.usefixtures("memory_calls")
def test_every_peer_has_a_row(subject: peers.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def unbuilt(*arguments: object) -> None:
        pytest.fail("built")

    def broken(*arguments: object) -> None:
        raise RuntimeError("no such thing\nat all")

    absent = peers.Peer("absent", "absent", unbuilt, packages=("no-such-package",))
    elsewhere = peers.Peer("elsewhere", "elsewhere", unbuilt, devices=("cuda",))
    other = peers.Peer("other", "other dtype", unbuilt, dtypes=("bf16",))
    unable = peers.Peer("unable", "unable", broken)
    ours = tuple(peer for peer in peers.PEERS if peer.key in TORCH_ONLY)
    monkeypatch.setattr(field, "PEERS", (absent, elsewhere, other, unable, *ours))
    rows = rows_of(subject)
    notes = {name: row["note"] for name, row in rows.items()}
    assert notes == {
        "absent": "not installed: pip install no-such-package",
        "elsewhere": "timed on cuda only",
        "other dtype": "timed in bf16 only",
        "unable": "failed: RuntimeError: no such thing at all",
    } | {peer.name: None for peer in ours}
    assert all(rows[peer.name]["max_difference"] < 1e-5 for peer in ours)
    table = model_command.model_table(list(rows.values()), "")
    assert table.row_count == len(ours) and "absent: not installed" in str(table.caption)


@pytest.mark.parametrize("mistake", ["no mask", "nan"])
def test_wrong_answers_are_not_timed(subject: peers.Subject, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    dense = tiny("bert", "sequence")

    def wrong(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if mistake == "no mask":
            return dense(inputs["input_ids"]).logits
        return dense(**inputs).logits * float("nan")

    monkeypatch.setattr(field, "PEERS", (peers.Peer("wrong", "wrong", lambda *_: wrong),))
    with pytest.raises(ValueError, match=r"^wrong: answers differ from the reference"):
        rows_of(subject)


def test_a_skimming_run_is_held_to_its_own_decisions(subject: peers.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of the dense model, which its reports of skimmed tokens do not lead to."""
    build = next(peer for peer in peers.PEERS if peer.key == "skimming").build

    def cheating(subject: peers.Subject, *arguments: object) -> peers.Run:
        skimming, dense = build(subject, *arguments), tiny("bert", "sequence")

        def run(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            skimming(inputs)
            return dense(**inputs).logits

        return run

    cheat = peers.Peer("cheat", "cheat", cheating, "kept", ours=True)
    monkeypatch.setattr(field, "PEERS", (cheat,))
    with pytest.raises(ValueError, match=r"^cheat: answers differ"):
        rows_of(subject)


def test_ours_failing_is_an_error(subject: peers.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(field, "PEERS", (peers.Peer("keep-all", KEEP_ALL, broken, ours=True),))
    with pytest.raises(RuntimeError, match="no such thing"):
        rows_of(subject)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "albert"])
def test_pytorchs_own_encoder_has_the_models_weights(architecture: str) -> None:
    dense = tiny(architecture, "sequence")
    nested = next(peer for peer in peers.PEERS if peer.key == "nested")
    inputs = batches()[0].inputs
    with torch.no_grad():
        run = nested.build(peers.Subject("", dense, dense, ""), inputs, "fp32")
        torch.testing.assert_close(run(inputs), dense(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_varlen_attention_serves_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU in half precision; here with a stand-in that checks what it is given."""
    q, k, v = torch.randn(3, 7, 2, 8).bfloat16().unbind(0)

    def stand_in(*arguments: object) -> torch.Tensor:
        given, offsets, longest = arguments[:3], arguments[3], arguments[5]
        assert offsets.dtype == torch.int32 and offsets.tolist() == [0, 4, 7] and longest == 4
        return plain.one_by_one([4, 3])(*given)

    class OnGpu:
        is_cuda, dtype, device = True, torch.bfloat16, torch.device("cpu")

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in)
    assert torch.equal(plain.attention(OnGpu(), [4, 3])(q, k, v), plain.one_by_one([4, 3])(q, k, v))


# What a row says


@pytest.mark.usefixtures("memory_calls")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_figures(subject: peers.Subject, dtype: str) -> None:
    rows = {name: row for name, row in rows_of(subject, dtype).items() if row["note"] is None}
    lengths, padded = torch.tensor(LENGTHS), torch.tensor([9, 9, 14, 14])
    layers = torch.stack([(lengths * ratio).round().long().clamp(min=1) for ratio in RATIOS])
    shape = EncoderShape.of(subject.dense.config, subject.dense.config.hidden_size)
    executed = {
        PADDED: shape.dense_flops(padded),
        PLAIN: shape.dense_flops(lengths),
        KEEP_ALL: shape.dense_flops(lengths, first_token_only=True),
        SKIMMING: shape.as_executed().skimming_flops(lengths, layers, first_token_only=True),
    }
    for name, flops in executed.items():
        row = rows[name]
        assert row["flops"] == flops
        assert row["tokens"] == sum(LENGTHS) and row["padded_tokens"] == 46
        assert row["median_s"] == statistics.median(row["seconds"]) and row["repeats"] == len(row["seconds"]) == 2
        assert row["tokens_per_s"] == sum(LENGTHS) / row["median_s"]
        assert row["skim_efficiency"] == row["wall_clock_speedup"] / row["executed_flops_speedup"]
        assert row["executed_flops_speedup"] == executed.get(row["baseline"], executed[PLAIN]) / flops
        assert row["roofline_share"] == row["bound_s"] / row["median_s"] > 0
        assert row["bound_s"] >= 0.999 * max(row["flops"] / 1e11, row["bytes"] / 1e10)
        assert set(row["speedups"]) == set(rows) - {name}
        assert row["kernels"] is row["launches"] is row["host_syncs"] is None  # there is no GPU
    assert rows[SKIMMING]["flops_speedup"] == shape.flops_speedup(lengths, layers)
    padded_speedup = shape.dense_flops(padded) / shape.skimming_flops(lengths, layers)
    assert rows[SKIMMING]["flops_speedup_padded"] == padded_speedup
    assert rows[PADDED]["flops_speedup_padded"] == rows[PLAIN]["flops_speedup"] == rows[KEEP_ALL]["flops_speedup"] == 1


@pytest.mark.usefixtures("memory_calls")
@pytest.mark.parametrize(("dtype", "first_token_only"), [("fp32", True), ("bf16", False)])
def test_work_is_counted_in_the_rows_dtype_and_as_its_head_reads_it(
    subject: peers.Subject, dtype: str, first_token_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[object] = []
    monkeypatch.setattr(
        model, "measure_ceilings", lambda *given: (probed.append(given), roofline.Ceilings(1e10, 1e11))[1]
    )
    subject.skimming.skimming.first_token_only = first_token_only
    row = rows_of(subject, dtype)[KEEP_ALL]
    assert probed == 2 * [("cpu", DTYPES[dtype])] and row["tolerance"] == field.TOLERANCES[dtype]
    shape, lengths = EncoderShape.of_model(subject.skimming), torch.tensor(LENGTHS)
    assert row["flops"] == shape.dense_flops(lengths, first_token_only=first_token_only)
    size = DTYPES[dtype].itemsize
    works = [
        roofline.encoder_work(shape, part, part.expand(LAYERS, -1), size, first_token_only=first_token_only)
        for part in lengths.split(2)
    ]
    assert row["bytes"] == sum(roofline.total(works).moved)


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def rounds(limits: Limits) -> dict[str, int]:
        delays = {"quick": 0.0005, "measure": 0.01, "slow": 0.05}
        running = [Contender(name, lambda inputs, delay=delay: clock.sleep(delay)) for name, delay in delays.items()]
        found = time_in_turn(running, batches()[:1], 4, "measure", limits)
        return {name: len(times) for name, times in found.items()}

    assert rounds(Limits(slow=50)) == {"quick": 4, "measure": 4, "slow": 4}
    assert rounds(Limits(slow=2.5)) == {"quick": 4, "measure": 4, "slow": 1}
    assert rounds(Limits(slow=50, budget_s=0.07)) == {"quick": 4, "measure": 4, "slow": 2}
    assert rounds(Limits(budget_s=0)) == {"quick": 1, "measure": 1, "slow": 1}


# What it costs


def test_peak_memory_sees_a_large_tensor() -> None:
    watch = counters.PeakMemory("cpu")
    watch.reset()
    torch.ones(2**24).sum()  # 64 MiB, freed at once
    peak = watch.peak()
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell a process its resident memory")
    assert 60 * 2**20 < peak < 200 * 2**20
    assert counters.PeakMemory("cpu").peak() is not None


def test_peak_memory_is_not_short_of_what_others_left_behind() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell a process its resident memory")
    gc.disable()
    try:
        left: list[object] = [torch.ones(2**24)]  # 64 MiB, in a cycle
        left.append(left)
        del left
        watch = counters.PeakMemory("cpu")
        own = torch.ones(2**24)
        gc.collect()  # at any time
        watch.reset()
        assert 60 * 2**20 < watch.peak() < 200 * 2**20
        del own
    finally:
        gc.enable()


def test_launches_and_waits_are_counted_inside_the_marked_range() -> None:
    def at(start: float, end: float) -> SimpleNamespace:
        return SimpleNamespace(start=start, end=end)

    events = [
        ("transkimmer::counted", "CPU", at(10, 20)),
        ("transkimmer::counted", "CUDA", at(11, 21)),
        ("cudaLaunchKernel", "CPU", at(11, 12)),
        ("cudaLaunchKernelExC", "CPU", at(12, 13)),
        ("cuLaunchKernel", "CPU", at(13, 14)),
        ("cudaGraphLaunch", "CPU", at(14, 15)),
        ("cudaStreamSynchronize", "CPU", at(15, 16)),
        ("cudaMemcpyAsync", "CPU", at(16, 17)),
        ("cudaStreamIsCapturing", "CPU", at(16, 17)),
        ("cudaDeviceSynchronize", "CPU", at(22, 23)),  # the profiler's own
        ("some_kernel", "CUDA", at(12, 18)),
        ("another_kernel", "CUDA", at(18, 19)),
        ("Memcpy DtoH (Device -> Pageable)", "CUDA", at(19, 20)),
    ]
    assert counters.launches_of(events) == counters.Launches(kernels=2, launches=4, host_syncs=1)


# What the command takes, writes and refuses

KEYS = {"kind", "workload", "tokens", "padded_tokens", "contender", "works_on", "note"}
TIMED = {"seconds", "repeats", "median_s", "spread", "speedups", "baseline", "wall_clock_speedup", "tokens_per_s"}
TIMED |= {"executed_flops_speedup", "skim_efficiency", "flops_speedup", "flops_speedup_padded", "flops", "bytes"}
TIMED |= {"ceilings", "bound_s", "roofline_share", "kernels", "launches", "host_syncs", "peak_memory"}
TIMED |= {"max_difference", "tolerance", "build_s"}
WORKLOAD = {"model", "lengths", "schedule", "decisions", "batch_size", "batches", "dtype", "device", "threads"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("bert", "sequence").save_pretrained(path)
    return path


def run(folder: Path, *options: object) -> int:
    workload_options = ["--model", folder, "--lengths", "sst2", "--schedule", "1,0.6,0.2", "--batches", 1]
    rest = ["--repeats", 1, "--without", "compile", "onnx", "openvino"]
    return main(["bench", "model", *map(str, [*workload_options, *rest, *options])])


@pytest.mark.usefixtures("one_day", "memory_calls")
def test_rows_are_stored_by_device_day_and_commit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--batch-size", 1, 3, "--dtype", "fp32", "bf16", "--results", tmp_path) == 0
    (path,) = tmp_path.rglob("*.json")
    assert path.parent.name == results.device_name("cpu") and path.name in capsys.readouterr().out
    document = json.loads(path.read_text(encoding="utf-8"))
    assert path.stem == "2026-01-01-c0ffee" and document["schema"] == results.SCHEMA
    assert {"torch", "processor", "threads", "peers"} <= set(document["environment"])
    rows = document["rows"]
    assert [(row["workload"]["dtype"], row["workload"]["batch_size"]) for row in rows[:: len(peers.PEERS)]] == [
        ("fp32", 1),
        ("fp32", 3),
        ("bf16", 1),
        ("bf16", 3),
    ]
    assert [row["contender"] for row in rows] == 4 * [peer.name for peer in peers.PEERS]
    for row in rows:
        assert set(row) == (KEYS | TIMED if row["note"] is None else KEYS) and set(row["workload"]) == WORKLOAD
        assert row["workload"]["decisions"] == "synthetic"

    assert run(folder, "--batch-size", 3, "--results", tmp_path) == 0  # again, and one more
    assert run(folder, "--batch-size", 5, "--results", tmp_path) == 0
    again = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(again) == 5 * len(peers.PEERS)
    document["environment"]["torch"] = "another"
    path.write_text(json.dumps(document), encoding="utf-8")
    assert run(folder, "--batch-size", 3, "--results", tmp_path) == 2
    assert "holds rows of another environment" in capsys.readouterr().err
    assert run(folder, "--batch-size", 3, "--results", path) == 2
    assert f"--results {path}: must be a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--schedule", "1,0.6"], "--schedule 1,0.6: has 2 ratios, but the model has 3 layers"),
        (["--batch-size", "5000"], "--batch-size 5000: there are only 872 lengths"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--slow", "1"], "--slow 1.0: must be above 1"),
        (["--budget", "0"], "--budget 0.0: must be above 0"),
        (["--model", "demo"], "--schedule 1,0.6,0.2: the demo model's decisions are learned"),
        (["--kernels", "fast"], "--kernels fast: must be one of"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_refused_arguments(folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("device", "slow"), [("cpu", model_command.HOPELESS), ("cuda", math.inf)])
def test_what_is_too_slow_drops_out_on_a_cpu_alone(device: str, slow: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless --slow is given: the contenders on a GPU are quick enough."""
    monkeypatch.setattr(model_command, "device_of", lambda arguments: device)
    assert model_command._limits(argparse.Namespace(repeats=1, slow=None, budget=100.0)) == Limits(slow, 100.0)


@pytest.mark.parametrize("options", [["--lengths", "nowhere"], ["--batch-size", "0"], ["--without", "skimming"]])
def test_what_argparse_refuses(folder: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(folder, *options)


def test_the_demo_is_learned_on_its_own_sentences() -> None:
    arguments = model_command_arguments("--model", "demo", "--batch-size", "3", "--batches", "2")
    (here,) = setting.settings(arguments)
    here, subject, found = setting.prepare(here, "auto")
    assert (here.lengths, here.schedule, here.decisions) == ("sst2-dev", None, "learned")
    assert [batch.lengths.numel() for batch in found] == [3, 3] and subject.decisions == "learned"


def model_command_arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    setting.add_arguments(parser, many=True)
    return parser.parse_args(options)


def test_texts_are_no_longer_than_a_model_has_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoBERTa's positions begin behind its padding, so that two of its table's 80 are never a token's."""
    monkeypatch.setattr(workload, "load_model", lambda name: tiny("roberta"))
    longest = replace(SETTING, model="roberta", lengths="78", batch_size=1, batches=1)
    _, subject, (batch,) = setting.prepare(longest, "reference")
    subject.dense(**batch.inputs)
    with pytest.raises(ValueError, match="--lengths 79: a number must be from 1 to 78 here"):
        setting.prepare(replace(longest, lengths="79"), "reference")
