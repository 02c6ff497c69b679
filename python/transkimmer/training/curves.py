"""What a skimming model does while it trains: keep ratios by layer, both losses, the spread of the predictors' logits.

All of it comes from the forwards of the steps that are logged: other steps record nothing and wait for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import IntervalStrategy

from ..records import SkimRecord


def is_logged(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the step that is being computed will be logged, as `Trainer` decides after it; by epoch, it may be."""
    if args.logging_strategy != IntervalStrategy.STEPS:
        return args.logging_strategy == IntervalStrategy.EPOCH
    step = state.global_step + 1
    return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)


class SkimCurves:
    """Records of one optimizer step on this process, micro-batch by micro-batch; a new step replaces them."""

    def __init__(self) -> None:
        self.step = 0
        self.records: list[SkimRecord] = []
        self.task_losses: list[Tensor] = []

    def add(self, step: int, record: SkimRecord, outputs: Any, added: float | Tensor) -> None:
        """A micro-batch's forward and its outputs.

        step: what `TrainerState.global_step` will be after it. added: how much of the loss in them is the skim loss's.
        """
        if step != self.step:
            self.step, self.records, self.task_losses = step, [], []
        self.records.append(record)
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if loss is not None and record.skim_loss is not None:
            self.task_losses.append(loss.detach() - added)

    def scalars(self, logit_threshold: float) -> dict[str, float]:
        """Name -> value; this is where the host waits for the device.

        `task_loss` and `skim_loss` are means over the micro-batches. `keep_drawn/layer_00` and so on are shares of the
        real tokens that the layers worked on, `tokens_kept_drawn` their mean; with `threshold` for `drawn`, what
        `logit_threshold` would have kept by the same forward's logits, where it computed those of every token (not in
        pruned training, once something was skimmed).
        """
        found = {}
        if self.task_losses:
            found["task_loss"] = float(torch.stack(self.task_losses).mean())
        losses = [record.skim_loss.detach() for record in self.records if record.skim_loss is not None]
        if losses:
            found["skim_loss"] = float(torch.stack(losses).mean())
        total = sum(int(record.lengths.sum()) for record in self.records)
        if not total:
            return found
        drawn = torch.stack([record.layer_lengths.sum(1) for record in self.records]).sum(0)
        ratios = {"drawn": drawn.double() / total}
        if all(_scores_every_token(record) for record in self.records):
            kept = torch.stack([kept_by_threshold(record, logit_threshold) for record in self.records]).sum(0)
            ratios["threshold"] = kept.double() / total
        for rule, by_layer in ratios.items():
            found[f"tokens_kept_{rule}"] = float(by_layer.mean())
            found |= {f"keep_{rule}/layer_{layer:02d}": share for layer, share in enumerate(by_layer.tolist())}
        return found

    def logits(self) -> list[Tensor]:
        """Keep-minus-skim logits fp32 [tokens] per layer, on the host, of the tokens that were decided about."""
        layers = len(self.records[0].logits) if self.records else 0
        return [
            torch.cat([record.scored_logits(layer) for record in self.records]).float().cpu() for layer in range(layers)
        ]


def follow(trainer: Trainer) -> SkimCurves:
    """The curves of a trainer, with the callbacks that show them."""
    curves = SkimCurves()
    trainer.add_callback(LogitHistograms(curves, trainer.callback_handler))
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgress())
    return curves


def kept_by_threshold(record: SkimRecord, logit_threshold: float) -> Tensor:
    """int64 [layers]: real tokens that every predictor up to the layer's keeps at `logit_threshold`.

    It takes logits of every token: those of one that a draw has removed, a threshold might have kept.
    """
    keep = (torch.stack(record.logits) >= logit_threshold) | record.first_tokens  # [layers, tokens]
    return keep.int().cumprod(0).sum(1).cpu()


def _scores_every_token(record: SkimRecord) -> bool:
    return bool(record.logits) and not any(bool(logit.isnan().any()) for logit in record.logits)


class LogitHistograms(TrainerCallback):
    """At every logged step, a histogram of each layer's logits for TensorBoard, where `Trainer` reports to it."""

    def __init__(self, curves: SkimCurves, handler: CallbackHandler) -> None:
        self.curves = curves
        self.handler = handler

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if "loss" not in (logs or {}):  # the summary of the whole training, say
            return
        boards = [callback for callback in self.handler.callbacks if isinstance(callback, TensorBoardCallback)]
        writers = [board.tb_writer for board in boards if board.tb_writer is not None]
        if not writers or self.curves.step != state.global_step:
            return
        for layer, logits in enumerate(self.curves.logits()):
            for writer in writers:
                if logits.numel():
                    writer.add_histogram(f"delta/layer_{layer:02d}", logits, state.global_step)


class ShortProgress(ProgressCallback):
    """The progress bar, which prints what is logged, but nothing by layer: a dozen figures fill a screen."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        short = {name: value for name, value in (logs or {}).items() if "/" not in name}
        super().on_log(args, state, control, logs=short, **kwargs)
