"""`add_skimming`: switches skimming on, on the instance of a Hugging Face model, and off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from transkimmer_kernels import KERNELS, KernelSet, kernel_set
from transkimmer_kernels.registry import check_kernels
from transkimmer_kernels.runtime import GraphCache

from .architectures import ARCHITECTURES, architecture_of, encoder_of, reads_first_token_only
from .config import SkimConfig
from .embeddings import SkimmingEmbeddings
from .encoder import ATTENTION_NAME, SkimmingEncoder, packed_by_positions, skimming_class
from .graphed_training import GraphedTraining
from .graphs import MODES, GraphedForward
from .predictor import SkimPredictor
from .records import take_skim_loss
from .weights import WeightCache

# The key of config.json under which a saved model keeps its SkimConfig.
CONFIG_KEY = "skimming"


class Skimming:
    """The handle `model.skimming`: what can be read and changed about skimming on a live model."""

    # A misspelt setting is an AttributeError, and not a new attribute.
    __slots__ = ("__weakref__", "_encoder", "_former_attention", "_forward", "_hooks", "predictors")

    def __init__(self, encoder: SkimmingEncoder, former_attention: str, forward: GraphedForward) -> None:
        self._encoder = encoder
        self._former_attention = former_attention
        self._forward = forward
        self._hooks: list[Any] = []
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
        """Whether tokens are skimmed; False runs the dense model, predictors left out, still without padding."""
        return self._encoder.skim_enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._encoder.skim_enabled = bool(value)

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
        self._encoder.skim_first_token_only = bool(value)

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
        if not isinstance(value, bool):
            raise ValueError(f"graphed_training={value!r}: must be True or False")
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

    def refresh(self) -> None:
        """Prepares the kernels' copy of the weights anew.

        Needed only after changes that nothing counts, in eval mode: writing in place through `param.data` or a tensor
        that once was it, a fused optimizer's step, another `eps` of a LayerNorm.
        """
        self._encoder.skim_weights.clear()


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
        model: a BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT or ALBERT encoder with any head.
        config: defaults to `SkimConfig()`. Fresh predictors keep every token until they are trained.
        kernels: "auto", "cpu", "triton", "cuda" or "reference"; can be changed later at `model.skimming.kernels`.

    Raises:
        TypeError: `model` or `config` is something else.
        ValueError: the model is of another architecture, a decoder, already skimming, or an argument is out of range.
        BackendUnavailable: `kernels` cannot run here; the message says why.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model={model!r:.80}: must be a Hugging Face model, got {type(model).__name__}")
    if config is not None and not isinstance(config, SkimConfig):
        hint = f"; did you mean kernels={config!r}?" if config in KERNELS else ""
        raise TypeError(f"config={config!r:.80}: must be a SkimConfig or None, got {type(config).__name__}{hint}")
    architecture = architecture_of(model)
    check_kernels(kernels)
    encoder = encoder_of(model)
    if isinstance(encoder, SkimmingEncoder):
        raise ValueError("model: already has skimming; change model.skimming, or call remove_skimming first")
    config = SkimConfig() if config is None else config
    config.check()
    count = len(architecture.layers(encoder))
    weight = next(encoder.parameters())
    if weight.device.type != "meta":
        _kernels_for(encoder, kernels)
    saved = config.bind(count)
    predictors = nn.ModuleList(
        SkimPredictor(model.config.hidden_size, config.predictor_width, config.bias_init) for _ in range(count)
    )
    encoder.skim_predictors = predictors.to(device=weight.device, dtype=weight.dtype)
    encoder.skim_predictors.train(encoder.training)
    encoder.__class__ = skimming_class(type(encoder))
    encoder.skim_model_config = model.config
    encoder.skim_config = config
    encoder.skim_kernels = kernels
    encoder.skim_enabled = True
    encoder.skim_first_token_only = reads_first_token_only(model)
    encoder.skim_weights = WeightCache()
    encoder.skim_graphs = None
    embeddings: Any = model.base_model.embeddings
    embeddings.__class__ = skimming_class(type(embeddings), SkimmingEmbeddings)
    embeddings.skim_encoder = (encoder,)
    forward = GraphedForward(model, encoder)
    skimming = Skimming(encoder, model.config._attn_implementation, forward)
    model.skimming = skimming  # type: ignore[assignment]  # a plain attribute, no module
    model.forward = forward
    model._replicate_for_data_parallel = forward.replicate  # type: ignore[method-assign]
    model.set_attn_implementation(ATTENTION_NAME)
    setattr(model.config, CONFIG_KEY, saved)
    # For `Trainer`: the heads' loss is a mean over their batch, whatever arguments their forward lets through.
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    skimming._hooks = [
        model.register_forward_pre_hook(_check_arguments, with_kwargs=True),
        model.register_forward_hook(_add_skim_loss),
    ]
    return model


def remove_skimming(model: PreTrainedModel) -> PreTrainedModel:
    """Turns a skimming model back into the dense model it came from; the predictors are dropped."""
    skimming = skimming_of(model)
    encoder = skimming._encoder
    for hook in skimming._hooks:
        hook.remove()
    skimming.config.release(vars(model.config).pop(CONFIG_KEY, None))
    for name in [*vars(encoder), *encoder._modules]:
        if name.startswith("skim_"):
            delattr(encoder, name)
    encoder.__class__ = type(encoder).__mro__[2]
    embeddings: Any = model.base_model.embeddings
    embeddings.__class__ = type(embeddings).__mro__[2]
    del embeddings.skim_encoder
    skimming._forward.release()
    del model.skimming, model.forward, model._replicate_for_data_parallel, model.accepts_loss_kwargs
    model.set_attn_implementation(skimming._former_attention)
    return model


def _check_arguments(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Refuses what asks for states per layer; hands offsets to an encoder that would not see the positions."""
    for name in ("output_hidden_states", "output_attentions"):
        wanted = kwargs.get(name)
        if wanted or (wanted is None and getattr(model.config, name, False)):
            raise ValueError(
                f"{name}={wanted or True}: a skimming model has no per-layer states of every token to return; "
                "leave it off, or call remove_skimming first"
            )
    if ARCHITECTURES[model.config.model_type].encoder_sees_positions:
        return None
    given = {**dict(zip(skimming_of(model)._forward.names, args, strict=False)), **kwargs}
    inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    row = isinstance(inputs, Tensor) and inputs.dim() > 1 and inputs.size(0) == 1
    if not row or any(given.get(name) is not None for name in ("attention_mask", "cu_seq_lens_q")):
        return None
    cu_seqlens = packed_by_positions(given.get("position_ids"))
    return None if cu_seqlens is None else (args, {**kwargs, "cu_seq_lens_q": cu_seqlens})


def _add_skim_loss(model: PreTrainedModel, args: tuple[Any, ...], output: Any) -> Any:
    """In training, adds the weighted skim loss to the loss that the model's head computed, if it did."""
    skim_loss = take_skim_loss()
    if skim_loss is None or not model.training:
        return None
    extra = skimming_of(model).config.penalty(skim_loss)
    if isinstance(output, tuple):  # return_dict=False: the loss, a scalar, comes first where there is one
        if output and isinstance(output[0], Tensor) and output[0].dim() == 0:
            return (output[0] + extra, *output[1:])
    elif getattr(output, "loss", None) is not None:
        output.loss = output.loss + extra
    return output
