"""The encoder of a skimming model: a class that an existing encoder instance is switched to, weights and all."""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from transkimmer_kernels import KernelSet, Ragged, kernel_set
from transkimmer_kernels.ragged import as_bool, first_of_each
from transkimmer_kernels.runtime import Policy, Trace, run_encoder

from .architectures import ARCHITECTURES, Architecture, get
from .config import SkimConfig
from .graphed_training import GraphedTraining
from .losses import report_skim_loss
from .policies import PredictorPolicy, SchedulePolicy
from .records import SkimRecord, current_records
from .training_forward import LayerDecisions, PackedSequences, TrainingEncoder
from .weights import WeightCache

# Under this attention name Hugging Face hands the 2-D padding mask to the encoder as it is.
ATTENTION_NAME = "transkimmer"
# Where autocast runs LayerNorm, the dense encoder's last operator, in fp32.
_NORMS_IN_FP32 = ("cuda",)


def _padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return attention_mask


def _dense_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """For a dense model made from a skimming model's config, whose layers attend by themselves."""
    if mask is not None and mask.dim() == 2:
        mask = as_bool(mask)[:, None, None, :]
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionMaskInterface.register(ATTENTION_NAME, _padding_mask)
AttentionInterface.register(ATTENTION_NAME, _dense_attention)


class SkimmingEncoder(nn.Module):
    """Mixed into a Hugging Face encoder class; `skimming_class` makes the combination.

    Attributes set by `add_skimming`:
        skim_predictors: a `SkimPredictor` per layer, saved with the model.
        skim_model_config: the base model's Hugging Face config (DistilBERT's encoder has none of its own).
        skim_config: the live `SkimConfig`.
        skim_kernels: the choice of kernels.
        skim_enabled: False runs every layer on every token.
        skim_first_token_only: whether the head reads only the first token.
        skim_graphs: those of training, None where it is not to be graphed.
    """

    skim_model_config: Any
    skim_predictors: nn.ModuleList
    skim_config: SkimConfig
    skim_kernels: str
    skim_enabled: bool
    skim_first_token_only: bool
    skim_weights: WeightCache
    skim_graphs: GraphedTraining | None

    def train(self, mode: bool = True) -> Any:
        """Changing the mode drops the prepared weights: not every optimizer marks what it changes (fused AdamW)."""
        if mode != self.training:
            self.skim_weights.clear()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Drops the prepared weights: loading into inference tensors changes no version counter."""
        self.skim_weights.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        """A replica on another device needs weights that lie there."""
        replica = super()._replicate_for_data_parallel()
        replica.skim_weights = WeightCache()
        return replica

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """`.to()` and its like end here: what was prepared from the former weights would keep them in memory."""
        applied = super()._apply(*args, **kwargs)
        self.skim_weights.clear_if_changed()
        if self.skim_graphs is not None:
            self.skim_graphs.clear_if_moved()
        return applied

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """hidden_states [batch, seq, d]; attention_mask [batch, seq] or None; returns the architecture's output class.

        Packed input is [1, tokens, d] with `cu_seq_lens_q` (and `max_length_q`) among the keyword arguments, or with
        `position_ids` that start anew.

        Raises:
            RuntimeError: under torch.export or torch.jit.trace.
            ValueError: a mask or offsets that do not fit; states of every layer, cached keys or causal attention are
                asked for; another attention implementation was set.
        """
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise RuntimeError(
                "model: torch.export and torch.jit.trace cannot take a skimming model: its weights are packed outside "
                "of what they record. torch.compile can, and remove_skimming(model) gives the dense model"
            )
        self._refuse(kwargs)
        architecture = ARCHITECTURES[self.skim_model_config.model_type]
        if architecture.input_projection is not None:
            hidden_states = get(self, architecture.input_projection)(hidden_states)
        batch = self._enter(hidden_states, attention_mask, kwargs)
        record = SkimRecord((hidden_states.size(0), hidden_states.size(1)), batch.cu_seqlens)
        run = self._train if self.training else self._infer
        output = run(batch, architecture, record, attention_mask)
        if (records := current_records()) is not None:
            records.append(record)
        return architecture.output(last_hidden_state=output.view(hidden_states.shape))

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        """ValueError for what Hugging Face's encoder would heed and this one cannot."""
        if kwargs.get("past_key_values") is not None:
            raise ValueError("past_key_values: a skimming model takes no cached keys (nor PEFT's prefix tuning)")
        if kwargs.get("is_causal"):
            raise ValueError("is_causal=True: a skimming model attends in both directions")
        for name in ("output_hidden_states", "output_attentions"):
            wanted = kwargs.get(name)
            if wanted or (wanted is None and getattr(self.skim_model_config, name, False)):
                raise ValueError(
                    f"{name}={wanted or True}: a skimming model has no per-layer states of every token to return; "
                    "leave it off, or call remove_skimming first"
                )

    def _enter(self, hidden: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Ragged:
        if (name := self.skim_model_config._attn_implementation) != ATTENTION_NAME:
            raise ValueError(
                f"attn_implementation={name!r}: a skimming model attends by itself; after add_skimming it must stay "
                f"{ATTENTION_NAME!r} (model.set_attn_implementation), or call remove_skimming first"
            )
        kernels = kernel_set(self.skim_kernels, hidden.device.type)
        cu_seqlens, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
        if cu_seqlens is None and mask is None and hidden.size(0) == 1:
            cu_seqlens = packed_by_positions(kwargs.get("position_ids"))
        if cu_seqlens is None:
            if mask is not None and mask.shape != hidden.shape[:2]:
                raise ValueError(
                    f"attention_mask: a skimming model takes a padding mask [batch, seq] = {list(hidden.shape[:2])}, "
                    f"got {list(mask.shape)}"
                )
            return Ragged.from_padded(hidden, mask, kernels)
        if hidden.size(0) != 1:
            raise ValueError(f"cu_seq_lens_q: packed input has batch size 1, got input of {list(hidden.shape[:2])}")
        longest = None if longest is None else int(longest)
        return Ragged.from_packed(hidden[0], cu_seqlens.flatten().to(hidden.device, torch.int32), longest)

    def _infer(self, batch: Ragged, architecture: Architecture, record: SkimRecord, mask: Tensor | None) -> Tensor:
        given = batch.hidden
        dtype, device_type = given.dtype, given.device.type
        autocast = torch.is_autocast_enabled(device_type)
        if autocast:
            dtype = torch.get_autocast_dtype(device_type)
        kernels = kernel_set(self.skim_kernels, device_type, dtype)
        weights = self.skim_weights.get(
            self, architecture, self.skim_predictors, kernels, dtype, self.skim_first_token_only
        )
        weights.check_dropouts()
        config = self.skim_config
        trace = Trace(record.layer_slots, record.layer_cu_seqlens)
        wants_gradients = torch.is_grad_enabled()
        # Contexts that are there already are not entered again: each costs as much as a small kernel.
        with torch.no_grad() if wants_gradients else nullcontext():
            batch.hidden = given.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
            with (
                nullcontext() if torch.is_inference_mode_enabled() else torch.inference_mode(),
                torch.autocast(device_type, enabled=False) if autocast else nullcontext(),
            ):
                policy: Policy | None
                if not self.skim_enabled:
                    policy = None
                elif config.schedule is not None:
                    policy = SchedulePolicy(config.schedule, batch, weights.predictors, kernels)
                else:
                    sample = config.decision == "sample"
                    policy = PredictorPolicy(weights.predictors, kernels, config.logit_threshold, sample)
                run_encoder(
                    batch,
                    weights.layers,
                    self.skim_model_config.num_attention_heads,
                    kernels,
                    policy=policy,
                    trace=trace,
                )
            _show_first_token_in_front(batch.hidden, mask)
        wide = autocast and device_type in _NORMS_IN_FP32
        output = batch.hidden.to(torch.promote_types(given.dtype, torch.float32) if wide else given.dtype)
        if wants_gradients:
            # A replica of `nn.DataParallel` has no parameters of its own.
            trigger = next((p for p in self.parameters() if p.requires_grad), given)
            if given.requires_grad or trigger.requires_grad:
                output = _NoBackward.apply(output, trigger)
        return output

    def _train(self, batch: Ragged, architecture: Architecture, record: SkimRecord, mask: Tensor | None) -> Tensor:
        self.skim_weights.clear()
        device_type, dtype = batch.hidden.device.type, batch.hidden.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        kernels = kernel_set(self.skim_kernels, device_type, dtype)
        count = longest = 0
        if batch.batch:
            count, longest = torch.stack([batch.cu_seqlens[-1], batch.cu_seqlens.diff().max()]).tolist()
        rows = batch.slots[:count].long()
        encoder = TrainingEncoder(
            architecture.layers(self),
            list(self.skim_predictors) if self.skim_enabled else None,
            architecture,
            self.skim_config,
            self.skim_model_config.num_attention_heads,
            kernels,
            self.skim_config.temperature,
            self.skim_config.noise,
            self.skim_first_token_only,
        )
        hidden, graphs, result = batch.hidden[rows], self.skim_graphs, None
        if graphs is not None:
            result = graphs.run(self, encoder, hidden, batch.cu_seqlens, longest)
        if result is None:
            sequences = PackedSequences(batch.cu_seqlens, longest, first_of_each(batch.cu_seqlens, count))
            result = encoder.run(hidden, sequences)
        if count and self.skim_enabled:
            record.skim_loss = result.skim_loss
            if record.skim_loss is None:  # tokens removed before a layer count as what they are there: skimmed
                record.skim_loss = torch.stack([layer.keep.sum() / count for layer in result.layers]).mean()
        report_skim_loss(record.skim_loss, self.skim_config)
        if current_records() is not None:
            _note(result.layers, batch, record, kernels)
        output = batch.hidden.to(result.hidden.dtype).index_copy(0, rows, result.hidden)
        _show_first_token_in_front(output, mask)
        return output


def _note(layers: Sequence[LayerDecisions], batch: Ragged, record: SkimRecord, kernels: KernelSet) -> None:
    """Puts into `record` what a training forward decided on the tokens of `batch`."""
    for decided in layers:
        present = batch.slots.index_select(0, decided.rows)
        slots, cu_seqlens = kernels.compact(decided.keep.detach() > 0.5, present, decided.cu_seqlens, False)
        record.layer_slots.append(slots)
        record.layer_cu_seqlens.append(cu_seqlens)
        if decided.logit is not None:
            logit = decided.logit.detach()
            all_logits = logit.new_full((layers[0].rows.numel(),), torch.nan)
            record.logits.append(all_logits.index_copy(0, decided.rows.long(), logit))


class _NoBackward(torch.autograd.Function):
    """The identity whose backward raises: better than a head that trains on a silently frozen encoder."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, trigger: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "a skimming encoder in eval mode has removed tokens in place and keeps no graph: call model.train() "
            "before a forward whose gradient is needed"
        )


def _show_first_token_in_front(output: Tensor, mask: Tensor | None) -> None:
    """Left padding: position 0 of a row that starts with padding shows its first real token, which heads pool from.

    output: [batch * seq, d], changed in place; mask: [batch, seq].
    """
    if mask is None or mask.size(1) == 0 or _known_to_start_in_front(mask):
        return
    batch, length = mask.shape
    real = as_bool(mask).view(torch.int8)  # argmax takes no bool
    first = torch.arange(0, batch * length, length, device=mask.device) + real.argmax(1)
    output.view(batch, length, output.size(1))[:, 0] = output.index_select(0, first)


def _known_to_start_in_front(mask: Tensor) -> bool:
    """Only a CPU is asked: a device would have to be waited for."""
    return mask.device.type == "cpu" and all(mask[:, 0].tolist())  # numbers: an operator that reduces takes longer


def packed_by_positions(position_ids: Tensor | None) -> Tensor | None:
    """Offsets of sequences flattened into one row, where positions [1, tokens] start anew; None for a single one.

    A position that repeats starts one only where it is the lowest: others may have been cut to what a model has.
    """
    if position_ids is None or position_ids.size(0) != 1 or position_ids.size(1) < 2:
        return None
    row = position_ids[0]
    step = row.diff()
    starts = ((step < 0) | ((step == 0) & (row[1:] == row.min()))).nonzero().flatten() + 1
    if starts.numel() == 0:
        return None
    ends = starts.new_tensor([position_ids.size(1)])
    return torch.cat([ends.new_zeros(1), starts, ends]).int()


def offsets_of(given: dict[str, Any]) -> dict[str, Tensor]:
    """`cu_seq_lens_q` of sequences packed into one row, for an encoder that is not given their positions."""
    inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    row = isinstance(inputs, Tensor) and inputs.dim() > 1 and inputs.size(0) == 1
    if not row or any(given.get(name) is not None for name in ("attention_mask", "cu_seq_lens_q")):
        return {}
    cu_seqlens = packed_by_positions(given.get("position_ids"))
    return {} if cu_seqlens is None else {"cu_seq_lens_q": cu_seqlens}


class _SkimmingType(type):
    """The type of classes made by `skimming_class`: pickled by what they are made of, so that any process has them."""


_classes: dict[tuple[type, type], type] = {}


def skimming_class(kind: type, mixin: type = SkimmingEncoder) -> type:
    """`kind` with the forward of `mixin`; always the same class."""
    if (kind, mixin) not in _classes:
        _classes[kind, mixin] = _SkimmingType(f"Skimming{kind.__name__}", (mixin, kind), {"__module__": __name__})
    return _classes[kind, mixin]


def original_class(made: type) -> Any:
    """The `kind` that `skimming_class` made a class of."""
    return made.__bases__[1]


def _made_of(cls: type) -> tuple[Any, tuple[type, type]]:
    mixin, kind = cls.__bases__
    return skimming_class, (kind, mixin)


copyreg.pickle(_SkimmingType, _made_of)
