"""The weights of an encoder as the kernels want them: fused, cast, packed, and redone when a parameter changes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.activations import GELUActivation

from transkimmer_kernels import KernelSet
from transkimmer_kernels.runtime import LayerWeights, PredictorWeights

from .architectures import Architecture, check_containers, get, has_own_forward
from .predictor import SkimPredictor


@dataclass(frozen=True)
class EncoderWeights:
    """What inference runs on. dropouts: of the layers; inference leaves them out, so they have to be in eval mode."""

    layers: list[LayerWeights]
    predictors: list[PredictorWeights]
    dropouts: list[nn.Dropout]

    def check_dropouts(self) -> None:
        """RuntimeError if the encoder is in eval mode and one of its dropouts is not."""
        if any(dropout.training and dropout.p > 0 for dropout in self.dropouts):
            raise RuntimeError(
                "model: a dropout of the encoder is in training mode while the encoder is in eval mode; skimming "
                "inference applies no dropout: call model.eval(), or use remove_skimming(model) to draw from dropout"
            )


class WeightCache:
    """One prepared copy of an encoder's weights, checked against the parameters at every use.

    A parameter counts as changed when it is another object, or its storage or version counter is another:
    assignments, `load_state_dict`, `.to()` and in-place operations are seen. Fused optimizers do not count their
    steps, so the encoder also clears the cache whenever it trains or is switched between modes. Writing through
    `param.data` in eval mode is not seen, nor is a fused optimizer's step there, nor another eps of a LayerNorm.
    """

    def __init__(self) -> None:
        self._held: tuple[tuple[Any, ...], Watch, EncoderWeights] | None = None

    def clear(self) -> None:
        self._held = None

    def clear_if_changed(self) -> None:
        if self._held is not None and self._held[1].changed():
            self.clear()

    @property
    def held(self) -> EncoderWeights | None:
        """What the last `get` returned, None after `clear`."""
        return None if self._held is None else self._held[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCache:
        return WeightCache()  # packed weights cannot be copied, and the copy's parameters are others

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightCache, ()

    def get(
        self,
        encoder: nn.Module,
        architecture: Architecture,
        predictors: nn.ModuleList,
        kernels: KernelSet,
        dtype: torch.dtype,
        first_token_only: bool,
    ) -> EncoderWeights:
        key = (kernels.choice, kernels.device_type, dtype, first_token_only)
        held = self._held
        if held is None or held[0] != key or held[1].changed():
            self._held = None  # frees the old copy before the new one is made
            with torch.inference_mode(False), torch.no_grad():
                weights = _prepare(encoder, architecture, predictors, kernels, dtype, first_token_only)
            held = self._held = (key, Watch(encoder), weights)
        return held[2]


_END = object()


class Watch:
    """Notices a change of any parameter below a module, and a buffer that is another.

    Walking the modules each time would take several times as long; what runs here per parameter is not even Python.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.named_modules())
        tables = (t for _, m in self.modules for t in (m._modules, m._parameters, m._buffers) if t)
        self._views = list(map(dict.values, tables))
        self._values = list(self._listed())
        self._parameters = list(module.parameters())
        self._kept = [p.detach() for p in self._parameters]  # so that nothing new comes to lie where they do
        # An inference tensor has no version counter, and no way to be changed outside of inference mode.
        self._counting = [p for p in self._parameters if not p.is_inference()]
        self._places, self._versions = self._read_places(), self.versions()

    def _listed(self) -> Iterator[Any]:
        """What the modules consist of, in order, and an end: one thing more or less puts something in another place."""
        return itertools.chain(itertools.chain.from_iterable(self._views), (_END,))

    def _read_places(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._parameters))

    def versions(self) -> list[int]:
        """How often each parameter was changed in place, as far as it was counted."""
        return list(map(operator.attrgetter("_version"), self._counting))

    def moved(self) -> bool:
        """Whether a parameter or a buffer is another one, or lies elsewhere; its values may have changed."""
        return not all(map(operator.is_, self._listed(), self._values)) or self._read_places() != self._places

    def changed(self) -> bool:
        return self.moved() or self.versions() != self._versions


@contextmanager
def leaves_of_its_own(modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Inside, `modules` have other parameters of the same memory, those that stand for `parameters`.

    Autograd accumulates a parameter's gradient on the stream where the parameter was first used, and remembers that as
    long as any result is alive. After eager steps that may be a stream that is not captured, which ends the capture.
    """
    stand_ins = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in parameters}
    held = [(m, name, p) for m in modules for name, p in m._parameters.items() if id(p) in stand_ins]
    try:
        for module, name, p in held:
            module._parameters[name] = stand_ins[id(p)]
        yield [stand_ins[id(p)] for p in parameters]
    finally:
        for module, name, p in held:
            module._parameters[name] = p


@torch.compiler.disable  # weights are packed by kernels that a compiler cannot trace, and not in every forward
def _prepare(
    encoder: nn.Module,
    architecture: Architecture,
    predictors: nn.ModuleList,
    kernels: KernelSet,
    dtype: torch.dtype,
    first_token_only: bool,
) -> EncoderWeights:
    modules = architecture.layers(encoder)
    prepared: dict[int, LayerWeights] = {}  # a layer that is applied several times is prepared once
    layers = []
    for index, module in enumerate(modules):
        if first_token_only and index == len(modules) - 1:
            layers.append(_prepare_layer(module, architecture, kernels, dtype, split=True))
        else:
            if id(module) not in prepared:
                prepared[id(module)] = _prepare_layer(module, architecture, kernels, dtype, split=False)
            layers.append(prepared[id(module)])
    paths = [path for path in (architecture.attention_dropout, architecture.ffn_dropout) if path is not None]
    inactive = [_plain(module, path, nn.Dropout, nn.Identity) for module in dict.fromkeys(modules) for path in paths]
    dropouts = [part for part in inactive if isinstance(part, nn.Dropout)]
    weights = EncoderWeights(layers, [_prepare_predictor(p, kernels, dtype) for p in predictors], dropouts)  # type: ignore[arg-type]
    if kernels.device_type == "cuda":
        with torch.cuda.device_of(weights.layers[0].qkv_weight):
            if not torch.cuda.is_current_stream_capturing():
                torch.cuda.current_stream().synchronize()  # another thread may read them on another stream
    return weights


def _prepare_layer(
    module: nn.Module, architecture: Architecture, kernels: KernelSet, dtype: torch.dtype, split: bool
) -> LayerWeights:
    def linear(path: str) -> tuple[Tensor, Tensor | None]:
        part = _plain(module, path, nn.Linear)
        return part.weight.to(dtype), None if part.bias is None else part.bias.to(dtype)

    def fuse(*paths: str) -> tuple[Tensor, Tensor | None]:
        weights, biases = zip(*map(linear, paths), strict=True)
        return kernels.pack_weight(torch.cat(weights)), None if biases[0] is None else torch.cat(biases)

    def packed(path: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = linear(path)
        return kernels.pack_weight(weight), bias

    a = architecture
    check_containers(module, a)
    norm1, norm2 = _plain(module, a.norm1, nn.LayerNorm), _plain(module, a.norm2, nn.LayerNorm)
    qkv_weight, qkv_bias = fuse(a.key, a.value) if split else fuse(a.query, a.key, a.value)
    query_weight, query_bias = packed(a.query) if split else (None, None)
    out_weight, out_bias = packed(a.out)
    ffn_in_weight, ffn_in_bias = packed(a.ffn_in)
    ffn_out_weight, ffn_out_bias = packed(a.ffn_out)
    activation = get(module, a.activation)
    return LayerWeights(
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        query_weight=query_weight,
        query_bias=query_bias,
        out_weight=out_weight,
        out_bias=out_bias,
        norm1_weight=norm1.weight.to(dtype),
        norm1_bias=norm1.bias.to(dtype),
        norm1_eps=norm1.eps,
        ffn_in_weight=ffn_in_weight,
        ffn_in_bias=ffn_in_bias,
        ffn_out_weight=ffn_out_weight,
        ffn_out_bias=ffn_out_bias,
        norm2_weight=norm2.weight.to(dtype),
        norm2_bias=norm2.bias.to(dtype),
        norm2_eps=norm2.eps,
        activation="gelu" if is_exact_gelu(activation) else activation,
    )


def _plain(module: nn.Module, path: str, *kinds: type[nn.Module]) -> Any:
    """The part of `module` at `path`; TypeError if calling it does more than PyTorch's own `kinds` do."""
    part, kind = get(module, path), kinds[0]
    parametrized = parametrize.is_parametrized(part)
    own = type(part).__bases__[0] if parametrized else type(part)
    if own not in kinds:
        name = type(part).__name__  # a quantised Linear is named like the plain one
        what = f"a {type(part).__module__}.{name}" if name == kind.__name__ else f"a {name}"
    elif has_own_forward(part):
        what = f"a {type(part).__name__} with a forward of its own"
    elif kind is not nn.Dropout and not parametrized and not _holds_its_parameters(part):
        what = f"a {type(part).__name__} whose weight or bias a hook computes, as pruning and the old weight_norm do"
    elif kind is nn.LayerNorm and (part.weight is None or part.bias is None):
        what = "a LayerNorm without weight or bias"
    else:
        return part
    raise TypeError(
        f"model: {path} is {what}; skimming inference calls no modules and takes plain nn.{kind.__name__} layers "
        "(merge adapters and make pruning permanent first; quantised layers are not supported)"
    )


def _holds_its_parameters(part: nn.Module) -> bool:
    # Those of a replica of `nn.DataParallel` are kept elsewhere.
    return {"weight", "bias"} <= {*part._parameters, *vars(part).get("_former_parameters", ())}


def is_exact_gelu(activation: object) -> bool:
    exact_module = isinstance(activation, nn.GELU) and activation.approximate == "none"
    return exact_module or type(activation) is GELUActivation or activation is nn.functional.gelu


def _prepare_predictor(predictor: SkimPredictor, kernels: KernelSet, dtype: torch.dtype) -> PredictorWeights:
    for name, kind in (("norm1", nn.LayerNorm), ("fc", nn.Linear), ("norm2", nn.LayerNorm), ("out", nn.Linear)):
        _plain(predictor, name, kind)
    out_weight, out_bias = predictor.difference()
    return PredictorWeights(
        norm1_weight=predictor.norm1.weight.to(dtype),
        norm1_bias=predictor.norm1.bias.to(dtype),
        fc_weight=kernels.pack_weight(predictor.fc.weight.to(dtype)),
        fc_bias=predictor.fc.bias.to(dtype),
        norm2_weight=predictor.norm2.weight.to(dtype),
        norm2_bias=predictor.norm2.bias.to(dtype),
        out_weight=out_weight.to(dtype).contiguous(),
        out_bias=out_bias.to(dtype),
        eps=predictor.norm1.eps,
    )
