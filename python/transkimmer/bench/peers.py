"""The contenders of `bench model`: the ways in which others, and we, run one classifier.

Peers are served as well as their defaults allow: fused graphs, dynamic shapes, as many threads as torch uses, and no
thread pool left spinning while another one is timed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..architectures import architecture_of, encoder_of, get
from ..skimming import skimming_of
from ..weights import is_exact_gelu
from .contenders import KEEP_ALL, PADDED, PLAIN, SKIMMING, use_plain_packed
from .swap import swap_encoder
from .workload import DTYPES

EAGER = "dense, padded (Hugging Face eager)"
COMPILED = "dense, padded (torch.compile, max-autotune)"
NESTED = "dense, nested tensors (nn.TransformerEncoder)"
ONNX = "dense, padded (ONNX Runtime)"
OPENVINO = "dense, padded (OpenVINO)"

Inputs = dict[str, Tensor]
Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Subject:
    """One classifier, dense and skimming, both in fp32, in eval mode and on the device that is timed.

    decisions: "synthetic" (a schedule) or "learned".
    """

    name: str
    dense: PreTrainedModel
    skimming: PreTrainedModel
    decisions: str


@dataclass(frozen=True)
class Peer:
    """One way to run a `Subject`.

    Args:
        key: as named on the command line; name: as printed.
        build: (subject, padded inputs to trace with, name of the dtype) -> padded inputs -> logits [batch, classes].
            The subject stays as it is.
        works_on: "padded" (every place of the batch), "real" (every real token) or "kept" (what is not skimmed).
        packages: needed from PyPI; devices, dtypes: where and in what it can be timed.
        ours: whether it runs on this package's kernels, and leaves out what the head does not read of the last layer.
        compiles_sizes: whether it compiles for the sizes of its first input, and anew for others.
    """

    key: str
    name: str
    build: Callable[[Subject, Inputs, str], Run]
    works_on: str = "padded"
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    ours: bool = False
    compiles_sizes: bool = False

    def why_not(self, device: str, dtype: str) -> str | None:
        """Why it cannot be timed here, None if it can."""
        if any(version is None for version in versions(self.packages).values()):
            return f"not installed: pip install {' '.join(self.packages)}"
        if device not in self.devices:
            return f"timed on {', '.join(self.devices)} only"
        if dtype not in self.dtypes:
            return f"timed in {', '.join(self.dtypes)} only"
        return None


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Installed version of each package; None where it is missing."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _dense(subject: Subject, dtype: str, attention: str = "sdpa") -> PreTrainedModel:
    model: Any = copy.deepcopy(subject.dense)
    model.to(dtype=DTYPES[dtype])
    model.set_attn_implementation(attention)
    return model


def _logits(model: PreTrainedModel) -> Run:
    return lambda inputs: model(**inputs).logits


def _eager(subject: Subject, example: Inputs, dtype: str) -> Run:
    return _logits(_dense(subject, dtype, "eager"))


def _sdpa(subject: Subject, example: Inputs, dtype: str) -> Run:
    return _logits(_dense(subject, dtype))


def _compiled(subject: Subject, example: Inputs, dtype: str) -> Run:
    compiled = torch.compile(_dense(subject, dtype), mode="max-autotune")
    return lambda inputs: compiled(**inputs).logits.clone()  # what a CUDA graph returned, its next replay overwrites


def _plain(subject: Subject, example: Inputs, dtype: str) -> Run:
    return _logits(use_plain_packed(_dense(subject, dtype)))


def _ours(enabled: bool) -> Callable[[Subject, Inputs, str], Run]:
    def build(subject: Subject, example: Inputs, dtype: str) -> Run:
        model: Any = copy.deepcopy(subject.skimming)
        model.to(dtype=DTYPES[dtype])
        skimming_of(model).enabled = enabled
        return _logits(model)

    return build


def _nested(subject: Subject, example: Inputs, dtype: str) -> Run:
    model = _dense(subject, dtype)
    encoder = as_transformer_encoder(model)

    def encode(hidden: Tensor, mask: Tensor) -> Tensor:
        return encoder(hidden, src_key_padding_mask=~mask)

    return _logits(swap_encoder(model, encode))


@torch.no_grad()
def as_transformer_encoder(model: PreTrainedModel) -> nn.TransformerEncoder:
    """The encoder of a dense model as PyTorch's own, whose fast path drops the padding.

    Raises:
        RuntimeError: its activation is not the exact GELU, which the fast path knows.
    """
    a = architecture_of(model)
    layers = a.layers(encoder_of(model))
    first, config = layers[0], model.config
    if not is_exact_gelu(get(first, a.activation)):
        raise RuntimeError("nn.TransformerEncoder: has a fast path for the exact GELU only")
    layer = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        get(first, a.ffn_in).out_features,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=get(first, a.norm1).eps,
        batch_first=True,
    )
    weight = next(model.parameters())
    encoder = (
        nn.TransformerEncoder(layer, len(layers), enable_nested_tensor=True).to(weight.device, weight.dtype).eval()
    )
    for module, source in zip(encoder.layers, layers, strict=True):
        attention = module.self_attn
        for kind in ("weight", "bias"):
            fused = torch.cat([getattr(get(source, path), kind) for path in (a.query, a.key, a.value)])
            getattr(attention, f"in_proj_{kind}").copy_(fused)
            for target, path in (
                (attention.out_proj, a.out),
                (module.linear1, a.ffn_in),
                (module.linear2, a.ffn_out),
                (module.norm1, a.norm1),
                (module.norm2, a.norm2),
            ):
                getattr(target, kind).copy_(getattr(get(source, path), kind))
    return encoder


class _Exported(nn.Module):
    """What is exported: two tensors in, one out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def _onnx_runtime(subject: Subject, example: Inputs, dtype: str) -> Run:
    import onnxruntime

    model = _dense(subject, dtype, "eager")  # SDPA's export guards every softmax against NaN, which is slower
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(
            _Exported(model).eval(),
            kwargs=example,
            f=path,
            input_names=list(example),
            dynamo=True,
            dynamic_shapes=dict.fromkeys(example, sizes),
            verbose=False,
        )
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return _by_name((put.name for put in session.get_inputs()), lambda arrays: session.run(None, arrays)[0])


def _openvino(subject: Subject, example: Inputs, dtype: str) -> Run:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = _Exported(_dense(subject, "fp32")).eval()  # casts by itself
    compiled = openvino.Core().compile_model(openvino.convert_model(model, example_input=example), "CPU", settings)
    return _by_name((name for put in compiled.inputs for name in put.names), lambda arrays: compiled(arrays)[0])


def _by_name(names: Iterable[str], compute: Callable[[dict[str, Any]], Any]) -> Run:
    """A run by NumPy arrays of those inputs that a compiled model has: it refuses others, and ignored ones are gone."""
    known = frozenset(names)

    def run(inputs: Inputs) -> Tensor:
        return torch.from_numpy(compute({name: tensor.numpy() for name, tensor in inputs.items() if name in known}))

    return run


PEERS = (
    Peer("eager", EAGER, _eager),
    Peer("sdpa", PADDED, _sdpa),
    Peer("compile", COMPILED, _compiled, compiles_sizes=True),
    Peer("nested", NESTED, _nested, "real"),
    Peer("onnx", ONNX, _onnx_runtime, "padded", ("onnx", "onnxruntime", "onnxscript"), ("cpu",), ("fp32",)),
    Peer("openvino", OPENVINO, _openvino, "padded", ("openvino",), ("cpu",)),
    Peer("plain", PLAIN, _plain, "real"),
    Peer("keep-all", KEEP_ALL, _ours(False), "real", ours=True),
    Peer("skimming", SKIMMING, _ours(True), "kept", ours=True),
)
