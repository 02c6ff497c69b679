"""`add_skimming`: switches skimming on, on the instance of a Hugging Face model, and off again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from transkimmer_kernels import KERNELS, KernelSet, kernel_set
from transkimmer_kernels.registry import check_kernels
from transkimmer_kernels.runtime import GraphCache

from .architectures import architecture_of, check_containers, encoder_of, has_own_forward, reads_first_token_only
from .config import SkimConfig
from .embeddings import SkimmingEmbeddings
from .encoder import ATTENTION_NAME, SkimmingEncoder, original_class, skimming_class
from .graphed_training import GraphedTraining
from .graphs import MODES, GraphedForward
from .predictor import SkimPredictor
from .records import SkimRecord
from .weights import WeightCache

# The key of config.json under which a saved model keeps its SkimConfig.
CONFIG_KEY = "skimming"


class Skimming:
    """The handle `model.skimming`: what can be read and changed about skimming on a live model."""

    # A misspelt setting is an AttributeError, and not a new attribute.
    __slots__ = ("__weakref__", "_encoder", "_former_attention", "_forward", "predictors")

    def __init__(self, encoder: SkimmingEncoder, former_attention: tuple[str, str], forward: GraphedForward) -> None:
        self._encoder = encoder
        self._former_attention = former_attention
        self._forward = forward
        self.predictors = encoder.skim_predictors

    @property
    def config(self) -> SkimConfig:
        """The live configuration; its fields may be changed between forwards, ValueError for a value out of range."""
        return self._encoder.skim_config

    @property
    def kernels(self) -> str:
        """The choice of kernels: "auto", "cpu", "triton", "cuda" or "reference"."""
        return self._encoder.skim_kernels

    @kernels.setter
    def kernels(self, kernels: str) -> None:
        check_kernels(kernels)
        _kernels_for(self._encoder, kernels)  # raises where they cannot run
        self._encoder.skim_kernels = kernels

    @property
    def enabled(self) -> bool:
        """Whether tokens are skimmed; False runs the dense model, predictors left out, still without padding.

        In training it then still has no dropout of attention probabilities; `remove_skimming` gives a dense baseline.
        """
        return self._encoder.skim_enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        _check_switch("enabled", value)
        self._encoder.skim_enabled = value

    @property
    def serves(self) -> dict[str, str]:
        """operator -> backend that runs it on the model's present device and in its present dtype."""
        return dict(_kernels_for(self._encoder, self.kernels).serves)

    @property
    def first_token_only(self) -> bool:
        """Whether the last layer computes only each sequence's first token, because the head reads nothing else."""
        return self._encoder.skim_first_token_only

    @first_token_only.setter
    def first_token_only(self, value: bool) -> None:
        _check_switch("first_token_only", value)
        self._encoder.skim_first_token_only = value

    @property
    def cuda_graphs(self) -> str:
        """ "auto": on a GPU, an inference forward is one CUDA graph from its size's second use on. "off": never.

        Like `kernels`, and unlike `config`, this belongs to the machine and is not saved with the model.
        """
        return self._forward.mode

    @cuda_graphs.setter
    def cuda_graphs(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"cuda_graphs={mode!r}: must be one of {', '.join(MODES)}")
        self._forward.mode = mode
        if mode == "off":
            self._forward.release()

    def capture(
        self,
        batch_size: int,
        sequence_length: int,
        *,
        inputs: Sequence[str] = ("input_ids", "attention_mask"),
        num_choices: int | None = None,
    ) -> None:
        """Captures a CUDA graph now; from then on it serves every input that fits into its size.

        Args:
            batch_size: most sequences of an input; sequence_length: most tokens of a sequence.
            inputs: the arguments that the model will be called with. `attention_mask` is always among them.
            num_choices: of a multiple-choice model, exactly.

        Raises:
            ValueError: an argument is out of range.
            RuntimeError: nothing can be captured now, with the reason; or the graph is larger than
                `graphs.max_bytes`.
        """
        self._forward.capture(batch_size, sequence_length, inputs, num_choices)

    @property
    def graphs(self) -> GraphCache:
        """The captured graphs: how many, their bytes, and the limits, which may be set."""
        return self._forward.cache

    @property
    def graphed_training(self) -> bool:
        """Whether training forwards and backwards are CUDA graphs, on a GPU; off until it is set.

        A step has to go backwards before the next one begins; one that does not, and whatever else cannot be captured,
        pruned training above all, runs eagerly. Belongs to the machine and is not saved with the model.
        """
        return self._encoder.skim_graphs is not None

    @graphed_training.setter
    def graphed_training(self, value: bool) -> None:
        _check_switch("graphed_training", value)
        if value != self.graphed_training:
            self._encoder.skim_graphs = GraphedTraining() if value else None

    @property
    def training_graphs(self) -> GraphedTraining | None:
        """The graphs of training, None where it is not graphed: how many, their bytes, and why the last was none."""
        return self._encoder.skim_graphs

    @property
    def why_eager(self) -> str | None:
        """Why the last forward in eval mode was not a replay of a graph; None if it was."""
        return self._forward.why_eager

    def penalty(self, records: Sequence[SkimRecord]) -> Tensor:
        """The skim penalty to add to a custom loss, for models that return none: a differentiable scalar.

        Args:
            records: from `record_skimming`; the mean of the skim losses of their training forwards counts.

        Raises:
            ValueError: no training forward is among them.
        """
        losses = [record.skim_loss for record in records if record.skim_loss is not None]
        if not losses:
            raise ValueError(f"records: {len(records)} of them, but of no forward in training with skimming enabled")
        return self.config.penalty(torch.stack(losses).mean())

    def refresh(self) -> None:
        """Prepares the kernels' copy of the weights anew.

        Needed only after changes that nothing counts, in eval mode: writing in place through `param.data` or a tensor
        that once was it, a fused optimizer's step, another `eps` of a LayerNorm.
        """
        self._encoder.skim_weights.clear()


def _check_switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be True or False")


def _kernels_for(module: nn.Module, kernels: str) -> KernelSet:
    weight = next(module.parameters())
    return kernel_set(kernels, weight.device.type, weight.dtype)


def skimming_of(model: Any) -> Skimming:
    """`model.skimming`; ValueError where there is none."""
    skimming = getattr(model, "skimming", None)
    if not isinstance(skimming, Skimming):
        raise ValueError(f"model: this {type(model).__name__} has no skimming; call add_skimming first")
    return skimming


def add_skimming(model: PreTrainedModel, config: SkimConfig | None = None, *, kernels: str = "auto") -> PreTrainedModel:
    """Adds a skim predictor before every layer of `model`'s encoder and lets the encoder skip what they skim.

    The instance is changed and returned; its class, head, outputs and parameter names stay, the predictors' parameters
    come on top. In `eval()` tokens are really removed; in `train()` they are masked inside the softmax, which computes
    the same, and the skim loss is added to the model's loss. `remove_skimming` undoes it.

    Args:
        model: a BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT or ALBERT encoder with any head. Its config is
            replaced by a copy, since models may share one.
        config: defaults to `SkimConfig()`. Fresh predictors keep every token until they are trained.
        kernels: "auto", "cpu", "triton", "cuda" or "reference"; can be changed later at `model.skimming.kernels`.

    Raises:
        TypeError: `model` or `config` is something else; a layer of the model has a forward of its own.
        ValueError: the model is of another architecture, a decoder, already skimming, or a forward was set on its
            instance; an argument is out of range.
        BackendUnavailable: `kernels` cannot run here; the message says why.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model={model!r:.80}: must be a Hugging Face model, got {type(model).__name__}")
    if config is not None and not isinstance(config, SkimConfig):
        hint = f"; did you mean kernels={config!r}?" if config in KERNELS else ""
        raise TypeError(f"config={config!r:.80}: must be a SkimConfig or None, got {type(config).__name__}{hint}")
    architecture = architecture_of(model)
    check_kernels(kernels)
    base: Any = model.base_model
    encoder, embeddings = encoder_of(model), base.embeddings
    if isinstance(encoder, SkimmingEncoder):
        raise ValueError("model: already has skimming; change model.skimming, or call remove_skimming first")
    _check_forwards(model, encoder, embeddings)
    config = SkimConfig() if config is None else config
    config.check()
    layers = architecture.layers(encoder)
    for layer in layers:
        check_containers(layer, architecture)
    count = len(layers)
    weight = next(encoder.parameters())
    if weight.device.type != "meta":
        _kernels_for(encoder, kernels)
    saved = config.bind(count)
    _own_config(model)
    width = base.config.hidden_size
    predictors = nn.ModuleList(SkimPredictor(width, config.predictor_width, config.bias_init) for _ in range(count))
    encoder.skim_predictors = predictors.to(device=weight.device, dtype=weight.dtype)
    encoder.skim_predictors.train(encoder.training)
    encoder.__class__ = skimming_class(type(encoder))
    encoder.skim_model_config = base.config
    encoder.skim_config = config
    encoder.skim_kernels = kernels
    encoder.skim_enabled = True
    encoder.skim_first_token_only = reads_first_token_only(model)
    encoder.skim_weights = WeightCache()
    encoder.skim_graphs = None
    embeddings.__class__ = skimming_class(type(embeddings), SkimmingEmbeddings)
    embeddings.skim_encoder = (encoder,)
    forward = GraphedForward(model, encoder)
    skimming = Skimming(encoder, tuple(c._attn_implementation for c in (model.config, base.config)), forward)
    model.skimming = skimming  # type: ignore[assignment]  # a plain attribute, no module
    model.forward = forward
    model._replicate_for_data_parallel = forward.replicate  # type: ignore[method-assign]
    _set_attention(model, ATTENTION_NAME, ATTENTION_NAME)
    setattr(model.config, CONFIG_KEY, saved)
    # For `Trainer`: the heads' loss is a mean over their batch, whatever arguments their forward lets through.
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    _forget_mixed_precision(model)
    return model


def _check_forwards(model: Any, encoder: nn.Module, embeddings: nn.Module) -> None:
    """ValueError if one of them has a forward that was set on the instance: skimming would never run, or that would."""
    names = {"model": model, "its encoder": encoder, "its embeddings": embeddings}
    for name, module in names.items():
        # `Trainer` wraps a model's forward in autocast, and wraps the next one anew.
        if has_own_forward(module) and "_original_forward" not in vars(module):
            raise ValueError(
                f"model: {name} has a forward that was set on the instance, as hooks of accelerate's device_map and "
                "torch.compile(module.forward) do; add skimming first, or remove them"
            )


def _set_attention(model: Any, outer: str, base: str) -> None:
    """`base` counts for a base model with a config of its own, `outer` for everything else."""
    model.set_attn_implementation(outer)
    if model.base_model.config is not model.config:
        model.base_model.set_attn_implementation(base)


def _own_config(model: PreTrainedModel) -> None:
    """Gives a model its own copy of a config that other models may share, because skimming changes it."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(vars(module).get("config"), PretrainedConfig):
            module.config = copy.deepcopy(module.config, copies)


def remove_skimming(model: PreTrainedModel) -> PreTrainedModel:
    """Turns a skimming model back into the dense model it came from; the predictors are dropped."""
    skimming = skimming_of(model)
    encoder = skimming._encoder
    skimming.config.release(vars(model.config).pop(CONFIG_KEY, None))
    for name in [*vars(encoder), *encoder._modules]:
        if name.startswith("skim_"):
            delattr(encoder, name)
    encoder.__class__ = original_class(type(encoder))
    embeddings: Any = model.base_model.embeddings
    embeddings.__class__ = original_class(type(embeddings))
    del embeddings.skim_encoder
    skimming._forward.release()
    del model.skimming, model.forward, model._replicate_for_data_parallel, model.accepts_loss_kwargs
    _set_attention(model, *skimming._former_attention)
    _forget_mixed_precision(model)
    return model


def _forget_mixed_precision(model: PreTrainedModel) -> None:
    """What a former `Trainer` has wrapped was another forward; the next one has to wrap again, or does not cast."""
    for name in ("_is_accelerate_prepared", "_original_forward"):
        vars(model).pop(name, None)
