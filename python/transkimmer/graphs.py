"""`model.forward` of a skimming model: one CUDA graph from embeddings to the head's readout, where that is possible."""

from __future__ import annotations

import inspect
import math
import operator
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from transkimmer_kernels.runtime.graphs import ENGINES, GraphCache, Tensors, round_up

from .architectures import ARCHITECTURES, has_foreign_hooks
from .encoder import SkimmingEncoder, offsets_of
from .losses import with_skim_loss
from .records import current_records
from .weights import EncoderWeights, Watch

MODES = ("auto", "off")
# What a graph has buffers for, and the dtypes of these; embeddings come in their own.
_DTYPES = {"attention_mask": torch.bool, **dict.fromkeys(("input_ids", "token_type_ids", "position_ids"), torch.int64)}
INPUTS = (*_DTYPES, "inputs_embeds")
_MAX_CORNERS = 256
# Arguments that change nothing where they have these values.
_DEFAULTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


@dataclass(frozen=True)
class Request:
    """Inputs of one forward. shape: (batch, seq), or (batch, choices, seq)."""

    inputs: Tensors
    shape: tuple[int, ...]


class GraphedForward:
    """Stands in for the forward of a model instance: replays a graph, or says why not and runs the class's forward."""

    def __init__(self, model: PreTrainedModel, encoder: SkimmingEncoder) -> None:
        self._model = model
        self._encoder = encoder
        self.mode = "auto"
        self.sizes: list[tuple[int, int]] = []  # that `capture` was asked for
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.why_eager: str | None = "nothing ran yet"
        self.names = list(self.__signature__.parameters)  # of the arguments
        self.cache = GraphCache(lambda: ENGINES[self._device().type](self._device()))
        self._seen: set[Hashable] = set()
        self._refused: dict[Hashable, str] = {}
        self._watch: Watch | None = None
        self._weights: weakref.ref[EncoderWeights] | None = None
        self._longest: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("_model", "_encoder", "mode", "sizes")}  # graphs cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_afresh()

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the class's forward: `Trainer` reads from it which columns of a data set are wanted."""
        signature = inspect.signature(type(self._model).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def __func__(self) -> Callable[..., Any]:
        """As a method has one: mixed precision wraps it and binds what comes of it, which a copy binds to itself."""

        def forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            skimming: Any = model.skimming
            return skimming._forward(*args, **kwargs)

        forward.__signature__ = inspect.signature(type(self._model).forward)  # type: ignore[attr-defined]
        return forward

    @property
    def __code__(self) -> CodeType:
        """torch.export looks for arguments in it, before the encoder can say that it does not export."""
        return type(self._model).forward.__code__

    def replicate(self) -> PreTrainedModel:
        """For `nn.DataParallel`, whose replicas have to run their own forward."""
        replica = type(self._model)._replicate_for_data_parallel(self._model)
        del replica._replicate_for_data_parallel
        own = weakref.ref(replica)  # so that a step's replicas go with the step

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(cast(PreTrainedModel, own()), self._run_eagerly, *args, **kwargs)

        vars(replica)["forward"] = forward
        return replica

    def _device(self) -> torch.device:
        predictors: Any = self._encoder._modules["skim_predictors"]
        try:  # by the dictionaries: attributes of modules are looked up in Python
            weight: Any = predictors._modules["0"]._modules["fc"]._parameters["weight"]
        except KeyError:  # pruned, parametrised, wrapped
            weight = next(predictors.parameters())
        return weight.device

    def _positions(self) -> int:
        """Tokens that a sequence may have, looked up once per set of weights."""
        longest = self._longest  # another thread may forget it meanwhile
        if longest is None:
            longest = self._longest = _longest(self._model)
        return longest

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        how = self._run_eagerly if torch.compiler.is_compiling() else self._by_graph
        return self._run(self._model, how, *args, **kwargs)

    def _run(self, model: PreTrainedModel, how: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not ARCHITECTURES[self._encoder.skim_model_config.model_type].encoder_sees_positions:
            kwargs |= offsets_of({**dict(zip(self.names, args, strict=False)), **kwargs})
        if not model.training:
            return how(model, args, kwargs)
        return with_skim_loss(model, lambda: how(model, args, kwargs))

    def _run_eagerly(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return type(model).forward(model, *args, **kwargs)

    def _by_graph(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        request = self._why_not_now() or self._request(args, kwargs)
        output: ModelOutput | str
        if isinstance(request, str):
            output = request
        else:
            with self.cache.lock:
                output = self._serve(request)
        if isinstance(output, str):
            self.why_eager = output
            return self._run_eagerly(model, args, kwargs)
        self.why_eager = None
        return output

    def capture(self, batch_size: int, sequence_length: int, inputs: Sequence[str], num_choices: int | None) -> None:
        """See `Skimming.capture`."""
        size, longest = (batch_size, sequence_length), _longest(self._model)
        for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if sequence_length > longest:
            raise ValueError(f"sequence_length={sequence_length}: the model has positions for {longest} tokens")
        if unknown := sorted(set(inputs) - set(INPUTS)):
            raise ValueError(f"inputs: {unknown} cannot be captured, only {', '.join(INPUTS)}")
        shape = (batch_size, *([] if num_choices is None else [num_choices]), sequence_length)
        embedding: Tensor = self._model.get_input_embeddings().weight.detach()  # type: ignore[operator]
        given = {name: embedding.new_zeros(shape, dtype=_DTYPES.get(name)) for name in inputs}
        if "inputs_embeds" in given:
            given["inputs_embeds"] = embedding.new_zeros((*shape, embedding.size(1)))
        with torch.no_grad(), self.cache.lock:
            found = self._why_not_now() or self._request((), given)
            if isinstance(found, Request) and (why_not := self._why_not_these_modules()) is not None:
                found = why_not
            if isinstance(found, str):
                raise RuntimeError(f"capture: not now: {found}")
            self._replay(found, size)
            if size not in self.sizes:
                self.sizes.append(size)

    def release(self) -> None:
        """Forgets every graph; sizes that were asked for are captured again when they are used."""
        with self.cache.lock:
            self.cache.clear()
            self._seen.clear()
            self._refused.clear()
            self._watch = self._weights = self._longest = None

    def _why_not_now(self) -> str | None:
        """Why no forward could be replayed, whatever its inputs."""
        device = self._device()
        if self.mode == "off":
            return "cuda_graphs is 'off'"
        if device.type not in ENGINES:
            if self._watch is not None:
                self.release()  # it holds weights that the model has moved from
            return f"the model is on {device}"
        if self._model.training or self._encoder.training:
            if self._watch is not None:
                self.release()  # training changes the weights, and wants the memory
            return "the model is in training mode"
        if torch.is_grad_enabled():
            return "gradients are enabled: use torch.no_grad() or torch.inference_mode()"
        if torch.is_autocast_enabled(device.type):
            return "autocast is on: cast the model itself"
        if current_records() is not None:
            return "record_skimming() is open"
        if _get_current_dispatch_mode() is not None or torch.jit.is_tracing():
            return "the forward is being traced"
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "the caller is capturing a graph of its own"
        return None

    def _request(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request | str:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if len(given) < len(args) + len(kwargs):
            return "the arguments do not fit the model's forward"
        inputs = {}
        for name, value in given.items():
            if name in INPUTS and isinstance(value, Tensor):
                inputs[name] = value
            elif value is not None and (name not in _DEFAULTS or value is not _DEFAULTS[name]):
                return f"the argument {name} was given"
        return _checked(inputs, self._device(), self._positions())

    def _serve(self, request: Request) -> ModelOutput | str:
        """The output of a replay; where there was none, the reason.

        A graph that is there runs at once, and while the device works the host looks whether it should have: that takes
        longer than enqueuing it.
        """
        size = self._size(request)
        key = self._key(request, size)
        output = self._replay_at_once(request, size) if key in self.cache and not self._weights_are_gone() else None
        why_not = self._why_not_these_modules()
        if output is not None:
            if why_not is None and key in self.cache:
                return output
            self.cache.replays -= 1  # in vain
        if why_not is not None:
            return why_not
        if key not in self.cache:
            if key in self._refused:
                return self._refused[key]
            if size not in self.sizes and key not in self._seen:
                self._seen.add(key)
                return "the first forward of its size, which a second one would be captured for"
        try:
            return self._replay(request, size)
        except Exception as error:
            if key in self.cache:
                raise
            # Where it is the caller's error, the eager forward that follows raises it again.
            reason = self._refused[key] = f"capturing failed: {type(error).__name__}: {error}"
            warnings.warn(f"{type(self._model).__name__} runs without a CUDA graph: {reason}", stacklevel=4)
            return reason

    def _replay_at_once(self, request: Request, size: tuple[int, int]) -> ModelOutput | None:
        """Before it is known whether the graph is of these weights: it holds what it reads, so no harm is done."""
        try:
            return self._replay(request, size)
        except Exception:  # raised again by the replay that follows, unless the reason is a change
            return None

    def _why_not_these_modules(self) -> str | None:
        """Drops the graphs when a parameter is another; then, why a replay would not be what the model does."""
        if self._watch is None or self._watch.changed() or self._weights_are_gone():
            self.release()
            self._watch = Watch(self._model)
            self._modules = [module for _, module in self._watch.modules]
            self._hooks = [hooks for m in self._modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        if any(map(operator.attrgetter("training"), self._modules)):
            return "a part of the model is in training mode"
        if has_foreign_hooks(self._hooks):
            return "a part of the model has hooks, which a replay would not call"
        configs = (self._model.config, self._encoder.skim_model_config)
        if any(getattr(config, "return_dict", True) is False for config in configs):
            return "config.return_dict is off"
        for name in ("output_hidden_states", "output_attentions"):
            if any(getattr(config, name, False) for config in configs):
                return f"config.{name} is set"
        return None

    def _weights_are_gone(self) -> bool:
        """Whether the kernels' copy of the weights is not the one that was captured."""
        if self._weights is None:
            return False
        captured, held = self._weights(), self._encoder.skim_weights.held
        return captured is None or captured is not held

    def _size(self, request: Request) -> tuple[int, int]:
        """(batch, seq) of the graph for a request: the smallest asked for that it fits into, else its own, rounded."""
        batch, length = request.shape[0], request.shape[-1]
        fitting = [size for size in self.sizes if size[0] >= batch and size[1] >= length]
        rounded = round_up(batch), min(round_up(length), self._positions())
        return min(fitting, key=math.prod, default=rounded)

    def _key(self, request: Request, size: tuple[int, int]) -> Hashable:
        """All that a graph depends on, parameters aside."""
        encoder, config = self._encoder, self._encoder.skim_config
        schedule = None if config.schedule is None else tuple(config.schedule)
        how = (encoder.skim_kernels, encoder.skim_enabled, encoder.skim_first_token_only)
        decided = (config.decision, config.threshold, schedule)
        embeds = request.inputs.get("inputs_embeds")
        names = frozenset(request.inputs) | {"attention_mask"}
        return size, request.shape[1:-1], names, None if embeds is None else embeds.dtype, how, decided

    def _replay(self, request: Request, size: tuple[int, int]) -> ModelOutput:
        key = self._key(request, size)
        with torch.inference_mode(False), torch.no_grad():
            output = self.cache.replay(key, lambda: _StaticForward(self._model, self._encoder, request, size), request)
        held = self._encoder.skim_weights.held
        self._weights = None if held is None else weakref.ref(held)
        return output


def _checked(inputs: Tensors, device: torch.device, longest: int) -> Request | str:
    """The request, or what is wrong with it; what is really wrong the eager forward refuses."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        return "there must be either input_ids or inputs_embeds"
    shape = tuple(ids.shape if ids is not None else embeds.shape[:-1])  # type: ignore[union-attr]
    if len(shape) not in (2, 3) or 0 in shape:
        return f"the input has the shape {list(shape)}"
    if shape[-1] > longest:
        return f"the input has {shape[-1]} tokens, the model positions for {longest}"
    for name, x in inputs.items():
        if type(x) is not Tensor or x.device != device:
            return f"{name} is a {type(x).__name__} on {x.device}, the model on {device}"
        is_row = name == "position_ids" and x.shape == (1, shape[-1])
        if name != "inputs_embeds" and x.shape != shape and not is_row:
            return f"{name} has the shape {list(x.shape)}, the input {list(shape)}"
    if "attention_mask" not in inputs and "position_ids" in inputs and math.prod(shape[:-1]) == 1:
        return "position_ids without an attention_mask may mean a packed row"
    return Request(inputs, shape)


def _longest(model: Any) -> int:
    """Tokens that a sequence may have; RoBERTa counts positions from behind its padding's."""
    embeddings = model.base_model.embeddings
    padding = vars(embeddings).get("padding_idx")
    return embeddings.position_embeddings.num_embeddings - (0 if padding is None else padding + 1)


class _StaticForward:
    """A model's forward on buffers [size[0], (choices,) size[1]], padded on the right and with empty sequences."""

    def __init__(
        self, model: PreTrainedModel, encoder: SkimmingEncoder, request: Request, size: tuple[int, int]
    ) -> None:
        self._model = model
        self.shape = (size[0], *request.shape[1:-1], size[1])
        like = next(iter(request.inputs.values()))
        self.inputs = {"attention_mask": like.new_zeros(self.shape, dtype=torch.bool)}
        for name, x in request.inputs.items():
            features = x.shape[-1:] if name == "inputs_embeds" else ()
            self.inputs[name] = x.new_zeros((*self.shape, *features), dtype=_DTYPES.get(name, x.dtype))
        self.nbytes = sum(x.nbytes for x in self.inputs.values())
        # Kept while the graph is: parameters may be given other memory before that is noticed.
        self._read = [x.detach() for x in (*model.parameters(), *model.buffers())]
        # Which axes of an output are as long as the sequence is: told by a forward that is one token shorter.
        shorter = (*self.shape[:-1], max(size[1] - 1, 1))
        self._shorter = {name: x.shape for name, x in self._forward(shorter).items()}
        self._prepared = encoder.skim_weights.held  # also kept: those of other settings may take their place
        self._corners: dict[tuple[int, ...], Tensors] = {}

    def _cut(self, shape: tuple[int, ...]) -> Tensors:
        """The corner of each buffer that holds an input of this shape."""
        last = len(shape) - 1
        return {name: x.narrow(0, 0, shape[0]).narrow(last, 0, shape[-1]) for name, x in self.inputs.items()}

    def _corner(self, shape: tuple[int, ...]) -> Tensors:
        """`_cut`, made once for each of the shapes that come again."""
        if (corner := self._corners.get(shape)) is None:
            if len(self._corners) >= _MAX_CORNERS:
                self._corners.clear()
            corner = self._corners[shape] = self._cut(shape)
        return corner

    def _forward(self, shape: tuple[int, ...]) -> ModelOutput:
        output = type(self._model).forward(self._model, **self._cut(shape))
        if not isinstance(output, ModelOutput):
            raise TypeError(f"the model returns a {type(output).__name__}, not a ModelOutput")
        for name, x in output.items():
            if not isinstance(x, Tensor) or x.dim() == 0 or x.size(0) != shape[0]:
                raise TypeError(f"the output {name} is no tensor with an entry per sequence of the batch")
        self._output_class = type(output)
        return output

    def load(self, request: Request) -> None:
        """Ids and embeddings beyond the request stay what they were: the mask takes them out."""
        if request.shape != self.shape:
            self.inputs["attention_mask"].zero_()
        for name, buffer in self._corner(request.shape).items():
            if name in request.inputs:
                buffer.copy_(request.inputs[name])
            elif name == "attention_mask":
                buffer.fill_(True)

    def run(self) -> Tensors:
        return dict(self._forward(self.shape))

    def result(self, outputs: Tensors, request: Request) -> ModelOutput:
        cut = {}
        for name, x in outputs.items():
            shorter = self._shorter[name]
            y = x.narrow(0, 0, request.shape[0])
            for axis in range(1, x.dim()):
                if x.size(axis) != shorter[axis]:
                    y = y.narrow(axis, 0, request.shape[-1])
            cut[name] = y.clone(memory_format=torch.contiguous_format)
        return self._output_class(**cut)
