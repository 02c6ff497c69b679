"""Training by CUDA graphs: an encoder's forward is one launch, its backward another, however many kernels they have.

A training step of BERT on packed sequences has well over a thousand kernels, and a fast device waits for its host.
Once the host knows how many tokens there are, which it asks before the layers, nothing in an unpruned training forward
depends on a value on the device, so it can be recorded once per size. Batches differ in their number of tokens. A
graph's is that number rounded up; the rows left over are sequences of their own, which are never read or attended
to, so that their gradients are zero.
"""

from __future__ import annotations

import dataclasses
import operator
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from transkimmer_kernels.ragged import first_of_each
from transkimmer_kernels.runtime.graphs import ENGINES, Captured, Engine, Tensors

from .architectures import HOOKS, get, has_foreign_hooks
from .training_forward import (
    LayerDecisions,
    PackedSequences,
    TrainingEncoder,
    TrainingResult,
    drawing_noise,
)
from .weights import Watch, leaves_of_its_own

_MAX_GRAPHS = 64
_STEP = 32  # tokens; sizes that differ by less are one


class _Size(NamedTuple):
    """What a graph has room for. spare: sequences that take the rows left over."""

    capacity: int
    batch: int
    longest: int
    spare: int


def graph_size(count: int, batch: int, longest: int) -> _Size:
    """The size of the graph for `count` tokens: less than a sixteenth of it is left over, or less than `_STEP`."""
    step = max(_STEP, 1 << max(count.bit_length() - 5, 0))
    longest = _coarsely(longest)
    return _Size(-(-count // step) * step, batch, longest, -(-(step - 1) // longest))


def _coarsely(longest: int) -> int:
    """The next of 32, 48, 64, 96, 128, 192, ...: it bounds launches, and what lies beyond a sequence costs nothing."""
    power = max(1 << (longest - 1).bit_length(), 32)
    return 3 * power // 4 if longest <= 3 * power // 4 and power > 32 else power


class GraphedTraining:
    """The graphs of one encoder, for one thread. A step goes backwards before the next one begins, or runs eagerly.

    Graphs share their memory: activations of the largest, one set of gradients, and each one's input and output. What
    Python decides in a layer, except the rates of dropout, stays what it was when its size was captured.

    Attributes:
        uses_before: how often a size runs eagerly before it is captured, which takes as long as ten steps or so.
        why_eager: why the last forward was not a replay, None if it was.
    """

    def __init__(self, uses_before: int = 0) -> None:
        self.uses_before = uses_before
        self.why_eager: str | None = "nothing ran yet"
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedTraining:
        return GraphedTraining(self.uses_before)  # a graph is of the parameters that it was recorded with

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphedTraining, (self.uses_before,)

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def pool_bytes(self) -> int:
        """Memory of all graphs' activations, inputs and gradients aside, which torch does not count as allocated."""
        return 0 if self._engine is None else self._engine.bytes_held()

    @property
    def bytes_held(self) -> int:
        """Memory of all graphs, and of the gradients that they share."""
        buffers = [*self._gradients, *(x for step in self._steps.values() for x in step.buffers)]
        return self.pool_bytes + sum(x.nbytes for x in buffers)

    def clear(self) -> None:
        """Forgets every graph and gives the memory back."""
        self._forget_graphs()
        self._refused: dict[Hashable, str] = {}
        self._uses: Counter[Hashable] = Counter()
        self._watch: Watch | None = None
        self._parameters: list[nn.Parameter] = []
        self._dropouts: list[nn.Dropout] = []
        self._flight: weakref.ref[_Flight] | None = None

    def clear_if_moved(self) -> None:
        """Gives the memory back if the parameters that graphs were recorded with are not the module's any more."""
        if self._watch is not None and self._watch.moved():
            self.clear()

    def _forget_graphs(self) -> None:
        if getattr(self, "_engine", None) is not None:
            self._engine.wait()
        self._engine: Any = None
        self._steps: OrderedDict[Hashable, _Step] = OrderedDict()
        self._gradients: list[Tensor] = []

    def run(
        self, module: nn.Module, encoder: TrainingEncoder, hidden: Tensor, cu_seqlens: Tensor, longest: int
    ) -> TrainingResult | None:
        """What `encoder.run` computes on packed states [tokens, d], by a replay; None, and `why_eager`, if it cannot.

        module: what has the parameters of the encoder's layers and predictors, and perhaps more.
        """
        self.why_eager = self._why_not(module, encoder, hidden)
        if self.why_eager is not None:
            return None
        size = graph_size(hidden.size(0), cu_seqlens.numel() - 1, longest)
        key = self._key(size, encoder, hidden)
        if key not in self._steps and key not in self._refused:
            self._uses[key] += 1
            if self._uses[key] <= self.uses_before:
                self.why_eager = (
                    f"its size has been used {self._uses[key]} times, of {self.uses_before} before a capture"
                )
                return None
            try:
                self._capture(key, size, encoder, hidden, cu_seqlens)
            except Exception as error:
                self._forget_graphs()
                reason = self._refused[key] = f"capturing failed: {type(error).__name__}: {error}"
                warnings.warn(f"{type(module).__name__} trains without a CUDA graph: {reason}", stacklevel=6)
        if key in self._refused:
            self.why_eager = self._refused[key]
            return None
        self._steps.move_to_end(key)
        assert self._watch is not None
        flight = _Flight(self._steps[key], self._engine, self._gradients, self._watch)
        self._flight = weakref.ref(flight)
        scalars = (encoder.temperature, encoder.noise)
        out, skim_loss, keep, logit = _Replay.apply(flight, scalars, hidden, cu_seqlens, *self._parameters)
        rows = torch.arange(hidden.size(0), dtype=torch.int32, device=hidden.device)
        logits = [None] * len(keep) if encoder.predictors is None else logit
        layers = [LayerDecisions(rows, cu_seqlens, k, x) for k, x in zip(keep, logits, strict=True)]
        return TrainingResult(out, layers, skim_loss)

    def _why_not(self, module: nn.Module, encoder: TrainingEncoder, hidden: Tensor) -> str | None:
        device = hidden.device.type
        if device not in ENGINES:
            self.clear_if_moved()
            return f"the model is on {hidden.device}"
        if not torch.is_grad_enabled():
            return "gradients are off"
        if encoder.predictors is not None and encoder.config.pruned_training:
            return "pruned training asks the device how many tokens are left"
        if not drawing_noise():
            return "decisions are made without noise"
        if hidden.size(0) == 0:
            return "the batch has no tokens"
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return "the forward is being traced"
        if device == "cuda" and torch.cuda.is_current_stream_capturing():
            return "the caller is capturing a graph of its own"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return "training is distributed"
        if self._flight is not None and (flight := self._flight()) is not None and not flight.landed:
            return "the last step has not gone backwards yet"
        return self._why_not_these(module)

    def _why_not_these(self, module: nn.Module) -> str | None:
        if getattr(module, "_is_replica", False):
            return "nn.DataParallel makes new parameters for every step"
        if self._engine is not None and self._engine.is_stale():
            self._forget_graphs()  # but not what cannot be captured, or captures would fail in turn without end
        if self._watch is None or self._watch.moved():
            self.clear()
            self._watch, self._parameters = Watch(module), list(module.parameters())
            self._dropouts = [m for m in module.modules() if isinstance(m, nn.Dropout)]
        modules = [m for _, m in self._watch.modules]
        if not all(map(operator.attrgetter("training"), modules)):
            return "a part of the encoder is in eval mode"
        if has_foreign_hooks(hooks for m in modules[1:] for hooks in map(vars(m).get, HOOKS)):
            return "a part of the encoder has hooks, which a replay would not call"
        if any(p._backward_hooks for p in self._parameters):
            return "a parameter of the encoder has hooks, which a replay would not call"
        if not any(p.requires_grad for p in self._parameters):
            return "nothing in the encoder is trained"
        if any(getattr(m, "gradient_checkpointing", False) for m in modules):
            return "gradient checkpointing is on"
        return None

    def _key(self, size: _Size, encoder: TrainingEncoder, hidden: Tensor) -> Hashable:
        """All that a graph depends on, values aside."""
        trained = tuple(map(operator.attrgetter("requires_grad"), self._parameters))
        how = (encoder.predictors is None, encoder.config.skim_attention, encoder.kernels.choice)
        rates = tuple(module.p for module in self._dropouts)
        return size, hidden.dtype, hidden.requires_grad, _autocast(hidden.device.type), how, trained, rates

    def _capture(
        self, key: Hashable, size: _Size, encoder: TrainingEncoder, hidden: Tensor, cu_seqlens: Tensor
    ) -> None:
        device = hidden.device
        if self._engine is None:
            self._engine = ENGINES[device.type](device)
            self._gradients = [p.new_empty(0) for p in self._parameters]
        for i, p in enumerate(self._parameters):
            if p.requires_grad and self._gradients[i].numel() != p.numel():
                self._gradients[i] = torch.empty_like(p)
        while len(self._steps) >= _MAX_GRAPHS:
            self._engine.wait()
            self._steps.popitem(last=False)
        assert self._watch is not None
        modules = [m for _, m in self._watch.modules]
        with (
            self._engine.exclusive(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            leaves_of_its_own(modules, self._parameters) as leaves,
        ):
            step = _Step(size, encoder, hidden, leaves)
            step.load(hidden.detach(), cu_seqlens, (encoder.temperature, encoder.noise))
            step.capture(self._engine, self._gradients)
        self._steps[key] = step


class _Step:
    """A training step on buffers: rows [capacity, d] of which the first ones are real."""

    def __init__(
        self, size: _Size, encoder: TrainingEncoder, hidden: Tensor, parameters: Sequence[nn.Parameter]
    ) -> None:
        self.size = size
        self.hidden = hidden.new_zeros(size.capacity, hidden.size(1)).requires_grad_(hidden.requires_grad)
        self.cu_seqlens = torch.zeros(size.batch + size.spare + 1, dtype=torch.int32, device=hidden.device)
        temperature, noise = hidden.new_zeros(2, dtype=torch.float32).unbind()
        self._scalars = (temperature, noise)
        self._encoder = dataclasses.replace(
            encoder, temperature=temperature, noise=noise, recompute=_draws_nothing(encoder)
        )
        self._autocast = _autocast(hidden.device.type)
        self._parameters = parameters
        self._tail = torch.arange(1, size.spare + 1, dtype=torch.int32, device=hidden.device) * size.longest
        self.buffers = [self.hidden, self.cu_seqlens]

    def load(self, hidden: Tensor, cu_seqlens: Tensor, scalars: tuple[float | Tensor, ...]) -> None:
        """The host waits for nothing."""
        count, batch = hidden.size(0), self.size.batch
        with torch.no_grad():
            self.hidden[:count].copy_(hidden)
            self.hidden[count:].zero_()
            self.cu_seqlens[: batch + 1].copy_(cu_seqlens)
            torch.clamp(self._tail + count, max=self.size.capacity, out=self.cu_seqlens[batch + 1 :])
            for buffer, value in zip(self._scalars, scalars, strict=True):
                buffer.fill_(value)

    def capture(self, engine: Engine, gradients: Sequence[Tensor]) -> None:
        """gradients: of each parameter, where they are written; empty for those that are not trained."""
        engine.warm_up(lambda: self._backward(self._forward(), gradients, empty=True))
        self.forward: Captured = engine.record(self._forward)
        outputs = self.forward.outputs
        # A replay's way back starts from here.
        self.grads = {name: torch.zeros_like(x) for name, x in outputs.items() if x.requires_grad}
        self.backward: Captured = engine.record(lambda: self._backward(outputs, gradients))
        self.forward.outputs = {name: x.detach() for name, x in outputs.items()}  # without what autograd knows
        self.buffers += self.grads.values()

    def _forward(self) -> Tensors:
        batch, capacity = self.size.batch, self.size.capacity
        device, autocast = self.hidden.device, self._autocast
        with torch.enable_grad(), torch.autocast(device.type, autocast, autocast is not None, cache_enabled=False):
            sequences = PackedSequences(self.cu_seqlens, self.size.longest, first_of_each(self.cu_seqlens, capacity))
            result = self._encoder.run(self.hidden, sequences)
            count = self.cu_seqlens[batch]
            real = torch.arange(capacity, device=device) < count
            keep = torch.stack([layer.keep for layer in result.layers])
            outputs = {
                "hidden": result.hidden,
                "skim_loss": (keep * real).sum(1).div(count).mean(),
                "keep": keep.detach(),
            }
            logits = [layer.logit.detach() for layer in result.layers if layer.logit is not None]
            return outputs | ({"logit": torch.stack(logits)} if logits else {})

    def _backward(self, outputs: Tensors, gradients: Sequence[Tensor], empty: bool = False) -> Tensors:
        roots = {name: x for name, x in outputs.items() if x.requires_grad}
        given = [torch.zeros_like(x) if empty else self.grads[name] for name, x in roots.items()]
        trained = [i for i, p in enumerate(self._parameters) if p.requires_grad]
        leaves = [*([self.hidden] if self.hidden.requires_grad else []), *(self._parameters[i] for i in trained)]
        found = list(torch.autograd.grad(list(roots.values()), leaves, given, allow_unused=True))
        result = {"hidden": found.pop(0)} if self.hidden.requires_grad else {}
        with torch.no_grad():
            self.reached = [i for i, gradient in zip(trained, found, strict=True) if gradient is not None]
            torch._foreach_copy_([gradients[i] for i in self.reached], [g for g in found if g is not None])
        return result


class _Flight:
    """One use of a step, between its way there and its way back."""

    def __init__(self, step: _Step, engine: Engine, gradients: Sequence[Tensor], watch: Watch) -> None:
        self.step, self.engine, self.gradients, self._watch = step, engine, gradients, watch
        self._versions = watch.versions()
        self.landed = False

    def check(self) -> None:
        """RuntimeError where the way back would not belong to the way there."""
        if self.landed:
            raise RuntimeError(
                "a step of graphed training goes backwards once, its activations are overwritten then: set "
                "model.skimming.graphed_training = False"
            )
        if self._watch.versions() != self._versions:
            raise RuntimeError("a parameter of the encoder was changed in place between a forward and its backward")


class _Replay(torch.autograd.Function):
    """(final states [tokens, d], skim loss, keep [layers, tokens], logit likewise): graphs instead of the encoder."""

    @staticmethod
    def forward(
        ctx: Any,
        flight: _Flight,
        scalars: tuple[float | Tensor, ...],
        hidden: Tensor,
        cu_seqlens: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.flight, ctx.count = flight, hidden.size(0)
        step = flight.step
        with flight.engine.exclusive():
            step.load(hidden, cu_seqlens, scalars)
            step.forward.replay()
            # The states are copied to their places at once; the rest may outlive the step.
            keep, logit = step.forward.outputs["keep"], step.forward.outputs.get("logit")
            keep = keep[:, : ctx.count].clone()
            logit = keep.new_empty(0) if logit is None else logit[:, : ctx.count].clone()
            out = step.forward.outputs["hidden"].detach()[: ctx.count]
            skim_loss = step.forward.outputs["skim_loss"].clone()
        ctx.mark_non_differentiable(keep, logit, *([] if "skim_loss" in step.grads else [skim_loss]))
        return out, skim_loss, keep, logit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_skim_loss: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        flight, count = ctx.flight, ctx.count
        step = flight.step
        flight.check()
        with flight.engine.exclusive():
            for name, grad in (("hidden", grad_out), ("skim_loss", grad_skim_loss)):
                if (buffer := step.grads.get(name)) is not None:
                    part = buffer[:count] if name == "hidden" else buffer
                    part.copy_(grad)
            if "hidden" in step.grads:
                step.grads["hidden"][count:].zero_()
            step.backward.replay()
            flight.landed = True
            grad_hidden = step.backward.outputs.get("hidden")
            grad_hidden = None if grad_hidden is None else grad_hidden[:count].clone()
            # Copies: the buffers are written again by the next step, and `.grad` may be kept or added to.
            gradients: list[Tensor | None] = [None] * len(flight.gradients)
            for i, copy in zip(
                step.reached, torch._foreach_mul([flight.gradients[i] for i in step.reached], 1), strict=True
            ):
                gradients[i] = copy
        return None, None, grad_hidden, None, *gradients


def _draws_nothing(encoder: TrainingEncoder) -> bool:
    """Whether feed-forward networks compute the same twice: adapters in them may have dropout of their own."""
    a = encoder.architecture
    for layer in encoder.layers:
        if any(type(get(layer, path)) is not nn.Linear for path in (a.ffn_in, a.ffn_out)):
            return False
        activation = get(layer, a.activation)
        parts = activation.modules() if isinstance(activation, nn.Module) else ()
        if any(isinstance(part, (nn.Dropout, nn.RReLU)) for part in parts):
            return False
    return True


def _autocast(device: str) -> torch.dtype | None:
    """The dtype of autocasting, None where it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
