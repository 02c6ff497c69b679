"""Times our runtime beside other people's: one BERT-base classifier, one process, batch by batch in turn.

    python benchmarks/peers.py --lengths mrpc --dtype bf16 --json results.json

The weights are random, which changes no dense time; the lengths are those of real texts. Every contender's logits are
compared with Hugging Face's in fp32 before anything is timed. Peers are served as well as their defaults allow: fused
graphs, dynamic shapes, as many threads as torch uses, and no thread pool left spinning while another one is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel
from transkimmer import SkimConfig, add_skimming
from transkimmer.bench import workload
from transkimmer.bench.command import DTYPES, environment, write_whole
from transkimmer.bench.contenders import KEEP_ALL, PADDED, SKIMMING, Contender, contenders
from transkimmer.bench.timing import paired_speedup, relative_spread, time_in_turn
from transkimmer.bench.workload import Batch

MODEL = "bert-base-shape"
# Largest difference from the fp32 logits, over the largest of them. Ignoring the padding mask makes it about 0.2.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}

Run = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Peer:
    """A runtime of others.

    name: as printed; packages: what it needs from PyPI; dtypes: what it can be timed in; build: (dense fp32 model,
    padded inputs to trace with, name of the dtype) -> padded inputs -> logits.
    """

    name: str
    packages: tuple[str, ...]
    dtypes: tuple[str, ...]
    build: Callable[[PreTrainedModel, dict[str, Tensor], str], Run]


@dataclass
class PeerRow:
    """Figures of one contender, or (`note`) why it has none.

    median_s: seconds for all batches; spread: (max - min) / median over repeats; speed: over ours without skimming,
    median of the paired ratios; logits_error: see TOLERANCES.
    """

    name: str
    median_s: float | None = None
    spread: float | None = None
    speed: float | None = None
    logits_error: float | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Without what it does not have."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class _Logits(nn.Module):
    """What is exported: two tensors in, one out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def onnx_runtime(model: PreTrainedModel, example: dict[str, Tensor], dtype: str) -> Run:
    import onnxruntime

    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")  # SDPA's export guards every softmax against NaN, which is slower
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(
            _Logits(model).eval(),
            kwargs=example,
            f=path,
            input_names=list(example),
            dynamo=True,
            dynamic_shapes=dict.fromkeys(example, sizes),
            verbose=False,
        )
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])

    return run


def openvino(model: PreTrainedModel, example: dict[str, Tensor], dtype: str) -> Run:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    converted = openvino.convert_model(_Logits(model).eval(), example_input=example)
    compiled = openvino.Core().compile_model(converted, "CPU", settings)

    def run(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(compiled({name: tensor.numpy() for name, tensor in inputs.items()})[0])

    return run


def torch_compile(model: PreTrainedModel, example: dict[str, Tensor], dtype: str) -> Run:
    compiled = torch.compile(copy.deepcopy(model).to(DTYPES[dtype]), dynamic=True)
    return lambda inputs: compiled(**inputs).logits


COMPILED = Peer("dense, padded (torch.compile)", (), ("fp32", "bf16"), torch_compile)
PEERS = (
    Peer("dense, padded (ONNX Runtime)", ("onnx", "onnxruntime", "onnxscript"), ("fp32",), onnx_runtime),
    Peer("dense, padded (OpenVINO)", ("openvino",), ("fp32", "bf16"), openvino),
    COMPILED,
)


def versions() -> dict[str, str | None]:
    """Installed versions of what the peers need; None where something is missing."""
    found: dict[str, str | None] = {}
    for package in (package for peer in PEERS for package in peer.packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def reason_left_out(peer: Peer, dtype: str, compile_too: bool) -> str | None:
    """Why `peer` cannot or shall not be timed, None if it will be."""
    installed = versions()
    if any(installed[package] is None for package in peer.packages):
        return f"not installed: pip install {' '.join(peer.packages)}"
    if dtype not in peer.dtypes:
        return f"timed in {', '.join(peer.dtypes)} only"
    if peer is COMPILED and not compile_too:
        return "not asked for: --compile"
    return None


def logits_errors(
    field: Sequence[Contender], batches: Sequence[Batch], reference: Sequence[Tensor], tolerance: float
) -> dict[str, float]:
    """name -> difference from the reference logits (see TOLERANCES); on the way, every contender warms up.

    Raises:
        ValueError: a dense contender's is above `tolerance`, or not a number.
    """
    scale = max(float(logits.abs().max()) for logits in reference)
    errors = {}
    for contender in field:
        logits = [contender.run(batch.inputs).float() for batch in batches]
        worst = torch.stack([(a - b).abs().max() for a, b in zip(logits, reference, strict=True)]).max()
        errors[contender.name] = error = float(worst) / scale
        if contender.name != SKIMMING and not error <= tolerance:
            raise ValueError(f"{contender.name}: logits differ from Hugging Face's by {error:.1e}, at most {tolerance}")
    return errors


@torch.no_grad()
def compare(model: PreTrainedModel, batches: Sequence[Batch], arguments: argparse.Namespace) -> list[PeerRow]:
    """A row per contender and peer, in the order of the table; `model` is left skimming, in the dtype asked for."""
    model.set_attn_implementation("sdpa")
    reference = [model(**batch.inputs).logits for batch in batches]
    # Traced with two sequences of two lengths, so that no size is taken for a constant and no mask for superfluous.
    example = workload.random_batches([12, 7], 2, 1, model.config.vocab_size)[0].inputs
    notes = {peer.name: reason_left_out(peer, arguments.dtype, arguments.compile) for peer in PEERS}
    wanted = [peer for peer in PEERS if notes[peer.name] is None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters warn of what might go wrong; the logits show whether it did
        peers = [Contender(peer.name, peer.build(model, example, arguments.dtype)) for peer in wanted]
    schedule = workload.parse_schedule(arguments.lengths, model.config.num_hidden_layers)
    add_skimming(model.to(DTYPES[arguments.dtype]), SkimConfig(schedule=schedule))
    padded, *padding_free = contenders(model)
    field = [padded, *peers, *padding_free]

    errors = logits_errors(field, batches, reference, TOLERANCES[arguments.dtype])
    seconds = time_in_turn(field, batches, arguments.repeats, KEEP_ALL)
    rows = {name: PeerRow(name, note=note) for name, note in {PADDED: None, **notes}.items()}
    for name, times in seconds.items():
        rows[name] = PeerRow(
            name=name,
            median_s=statistics.median(times),
            spread=relative_spread(times),
            speed=paired_speedup(seconds[KEEP_ALL], times),
            logits_error=errors[name],
        )
    return list(rows.values())


def table_of(rows: Sequence[PeerRow], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in ("speed ×", "median", "±", "logits error"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        figures = ["–"] * 4
        if row.note is None:
            figures = [f"{row.speed:.2f}", f"{row.median_s:.3f} s", f"{row.spread:.0%}", f"{row.logits_error:.0e}"]
        table.add_row(row.name, *figures, row.note)
    return table


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", choices=sorted(workload.known_lengths()), default="mrpc", help="and the schedule")
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--batches", type=positive, default=4)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--threads", type=positive, default=None, help="CPU threads; default: torch's own choice")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes a minute to compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the environment")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        model = workload.load_model(MODEL)
        lengths = workload.known_lengths()[arguments.lengths]
        batches = workload.random_batches(lengths, arguments.batch_size, arguments.batches, model.config.vocab_size)
        rows = compare(model, batches, arguments)
    except ValueError as error:
        print(f"peers.py: {error}", file=sys.stderr)
        return 1
    title = (
        f"{MODEL}, lengths and synthetic schedule of {arguments.lengths}; {arguments.dtype}, "
        f"{len(batches)} batches of {arguments.batch_size}, {torch.get_num_threads()} threads"
    )
    Console(width=None if os.isatty(1) else 140).print(table_of(rows, title))
    if arguments.json is not None:
        document = {
            "title": title,
            "environment": {**environment(), "peers": versions()},
            "rows": [row.to_dict() for row in rows],
        }
        write_whole(arguments.json, json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
