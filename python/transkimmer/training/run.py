"""A whole run: dense fine-tune, skimming training, calibration on held-out rows, the development rows read once."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from transkimmer_kernels.files import write_whole

from ..bench.environment import environment
from ..data import Features, padded_batches
from ..flops import EncoderShape
from ..loading import from_pretrained
from ..outputs import final_states, logits_in
from ..skimming import add_skimming, skimming_of
from ..tasks import Task, load_split
from .calibration import calibrate
from .evaluation import SkimEvaluation, deciding, evaluate, inputs_of
from .kinds import Kind, Rows, kind_of
from .recipe import MODEL, SETTINGS, Recipe
from .stages import drop_checkpoints, logged, save_whole, train_stage

RUN = "run.json"
EVALUATION_BATCH = 64
HELD_OUT_AT_MOST = 2000
USES_BEFORE_CAPTURE = 8  # batches grouped by length have dozens of sizes, of which a small task sees some but rarely
SPLIT_SEED = 0  # the same rows are held out whatever the run's seed


@dataclass
class Run:
    """One run of a recipe on a task; `carry_out` does it, or what is left of it.

    backbone: folder or hub name; not read, and may be None, where `dense` is there to start from.
    cuda_graphs: whether skimming training is graphed, on a GPU (`Skimming.graphed_training`).
    frozen_embeddings: whether the embeddings stay what they are in the backbone.
    """

    task: Task
    recipe: Recipe
    backbone: str | None
    output: Path
    data: Path | None = None
    dense: Path | None = None
    save_steps: int | None = None
    cuda_graphs: bool = True
    frozen_embeddings: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    claim: object = field(default=None, repr=False, compare=False)  # on `output`, by `prepare_output`

    @property
    def kind(self) -> Kind:
        return kind_of(self.task, self.recipe.doc_stride)

    @property
    def start(self) -> str | Path:
        """What training starts from."""
        start = self.dense or self.backbone
        assert start is not None
        return start

    def carry_out(self) -> dict[str, Any]:
        """Trains, calibrates, evaluates and writes `run.json`, which is also returned."""
        rows = load_split(self.task, "train", self.data)
        dev = load_split(self.task, "dev", self.data)
        train, held_out = hold_out(rows, self.recipe)
        self._check_held_out(rows, held_out)
        tokenizer = AutoTokenizer.from_pretrained(self.start)
        figures: dict[str, Any] = {"rows": {"train": len(train), "held_out": len(held_out), "dev": len(dev)}}
        # Before anything is trained, so that rows which do not fit, or cannot be skimmed so much, are known early.
        config = AutoConfig.from_pretrained(self.start)
        calibration, judged = (self.rows_of(examples, tokenizer, config) for examples in (held_out, dev))
        lengths = [batch["attention_mask"].sum(-1) for batch in calibration.batches]
        self.recipe.check_speedup(config, torch.cat(lengths))
        dense = self.dense_model(train, tokenizer)
        if self.recipe.mode == "dense" or self.recipe.warm_start:
            fitted = self.kind.fit(dense, calibration)
            figures["dense_dev"] = self.judged(dense, judged).to_dict() | fitted
        if self.recipe.mode == "dense":
            save_whole(dense, tokenizer, self.output / MODEL)
        else:
            model = self.skimming_model(dense, train, tokenizer)
            figures["calibration"] = self._calibrate(model, calibration)
            set_seed(self.recipe.seed)  # a resumed run draws the same decisions, where they are drawn
            figures["calibration"] |= self.kind.fit(model, calibration)
            save_whole(model, tokenizer, self.output / MODEL)
            figures["held_out"] = self._by_decision(model, calibration)
            figures["dev"] = self._by_decision(model, judged)
        return self._write(figures)

    def _check_held_out(self, rows: Sequence[Any], held_out: Sequence[Any]) -> None:
        """ValueError where `dense` was trained, as the settings of its run say, on some of the rows held out now."""
        if self.dense is None:
            return
        # A run's model lies in its output, or in the folder of its dense stage.
        places = (parent / SETTINGS for parent in self.dense.resolve().parents[:2])
        saved = next((place for place in places if place.is_file()), None)
        former = None if saved is None else json.loads(saved.read_text(encoding="utf-8"))
        if not isinstance(former, dict) or former.get("task") != self.task.name:
            return
        if former.get("data", self.settings()["data"]) not in (self.settings()["data"], None):
            warnings.warn(
                f"--dense {self.dense}: its run read rows from {former['data']}; if they stand in another order here, "
                "it was trained on some of the rows that are held out now",
                stacklevel=2,
            )
        theirs = {name: former["recipe"].get(name, getattr(Recipe, name)) for name in ("held_out", "limit")}
        # All runs draw in one order, the held-out rows first: fewer of them are the first of these.
        kept = len(hold_out(rows, dataclasses.replace(self.recipe, **theirs))[1])
        if len(held_out) > kept:
            raise ValueError(
                f"--dense {self.dense}: its run held out {kept} rows and trained on others of the {len(held_out)} that "
                f"are held out now; take its --held-out {theirs['held_out']} and "
                + ("no --limit" if theirs["limit"] is None else f"--limit {theirs['limit']}")
            )

    def rows_of(self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Rows:
        """As a model with this configuration reads them to be evaluated."""
        return self.kind.rows(examples, tokenizer, self.recipe.longest(config), EVALUATION_BATCH)

    def dense_model(self, train: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The model that skimming training starts from: a dense fine-tune, or the backbone as it is."""
        finished = self.dense or self.output / "dense" / MODEL
        if self.recipe.mode != "dense" and not self.recipe.warm_start:
            return self._fresh()
        if finished.is_dir():
            return self._finished(finished)
        if self.dense is not None:
            raise FileNotFoundError(f"--dense {self.dense}: no such folder")
        model = self._fresh()
        folder = self.output / "dense"
        examples = self.kind.features(train, tokenizer, self.recipe.longest(model.config))
        start = time.perf_counter()
        train_stage(model, tokenizer, examples, self.recipe, folder, skimming=False, save_steps=self.save_steps)
        self.seconds["dense"] = time.perf_counter() - start
        save_whole(model, tokenizer, finished)
        drop_checkpoints(folder)
        # Loaded like a resumed run loads it, so that both go on from the same numbers.
        return self._finished(finished)

    def _finished(self, folder: Path) -> PreTrainedModel:
        return self._to_train(on_device(self.kind.load(folder, "--dense")))

    def _fresh(self) -> PreTrainedModel:
        """The backbone with a head for the task: a new one, where that of another task has other outputs."""
        set_seed(self.recipe.seed)
        options = self.kind.options()
        model = self.kind.auto_class.from_pretrained(self.backbone, ignore_mismatched_sizes=True, **options)
        return self._to_train(model)

    def _to_train(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.frozen_embeddings:
            model.base_model.embeddings.requires_grad_(False)
        return model.float()  # files of 16 bits are loaded as they are

    def skimming_model(
        self, dense: PreTrainedModel, train: Sequence[Any], tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel:
        """Trained from `dense`, which is changed; not calibrated."""
        folder = self.output / "skimming"
        if (folder / MODEL).is_dir():
            return on_device(from_pretrained(folder / MODEL, self.kind.auto_class))
        examples = self.kind.features(train, tokenizer, self.recipe.longest(dense.config))
        if self.recipe.distils and self.recipe.warm_start:
            logits, states = lessons_of(dense, examples, tokenizer)
            # What no loss asks for would only travel with every batch.
            examples.teacher_logits = logits if self.recipe.distillation_weight else None
            examples.teacher_states = states if self.recipe.state_distillation_weight else None
        set_seed(self.recipe.seed)
        shape = EncoderShape.of(dense.config, self.recipe.predictor_width or dense.config.hidden_size)
        model = add_skimming(dense, self.recipe.skim_config(shape))
        if self.cuda_graphs and torch.cuda.is_available():
            skimming = skimming_of(model)
            skimming.graphed_training = True
            assert skimming.training_graphs is not None
            skimming.training_graphs.uses_before = USES_BEFORE_CAPTURE
        start = time.perf_counter()
        train_stage(model, tokenizer, examples, self.recipe, folder, skimming=True, save_steps=self.save_steps)
        self.seconds["skimming"] = time.perf_counter() - start
        skimming_of(model).graphed_training = False  # gives their memory back
        save_whole(model, tokenizer, folder / MODEL)
        drop_checkpoints(folder)
        # As it is saved, like the dense one: what trained it in mixed precision would compute in it still.
        return on_device(from_pretrained(folder / MODEL, self.kind.auto_class))

    def _calibrate(self, model: PreTrainedModel, rows: Rows) -> dict[str, Any]:
        """What was wanted, what was added to the logits, and why not, where it could not be reached."""
        with deciding(model, "threshold"):
            before = evaluate(model, rows.batches).flops_speedup
        report: dict[str, Any] = {"method": self.recipe.calibration, "argmax_flops_speedup": before}
        if self.recipe.calibration == "none":
            return report
        wanted = self.recipe.flops_speedup
        if self.recipe.calibration == "sampled":
            wanted = self._sampled(model, rows).flops_speedup
        try:
            with deciding(model, "threshold"):
                report |= {"flops_speedup": wanted, "shift": calibrate(model, rows.batches, wanted)}
        except ValueError as error:
            report["failed"] = str(error)
            print(f"not calibrated to FLOPs ×{wanted:g}: {str(error).partition(': ')[2]}")
        return report

    def _sampled(self, model: PreTrainedModel, rows: Rows) -> SkimEvaluation:
        set_seed(self.recipe.seed)
        with deciding(model, "sample"):
            return self.judged(model, rows)

    def _by_decision(self, model: PreTrainedModel, rows: Rows) -> dict[str, Any]:
        with deciding(model, "threshold"):
            threshold = self.judged(model, rows)
        return {"threshold": threshold.to_dict(), "sample": self._sampled(model, rows).to_dict()}

    def judged(self, model: PreTrainedModel, rows: Rows) -> SkimEvaluation:
        """By the task's metrics, as the model decides now."""
        return evaluate(model, rows.batches, self.kind.judge(rows.features, model))

    def _write(self, figures: dict[str, Any]) -> dict[str, Any]:
        curves = {stage: logged(self.output / stage) for stage in ("dense", "skimming")}
        document = {**self.settings(), **figures, "seconds": self.seconds, "environment": environment()}
        document["curves"] = {stage: steps for stage, steps in curves.items() if steps}
        if PartialState().is_main_process:
            write_whole(self.output / RUN, json.dumps(document, indent=2) + "\n")
        return document

    def settings(self) -> dict[str, Any]:
        """What a run has to have in common with the one that it resumes."""
        return {
            "task": self.task.name,
            "backbone": self.backbone if self.dense is None else None,
            "dense": None if self.dense is None else str(self.dense),
            "data": self.task.hub_name if self.data is None else str(self.data),
            "recipe": self.recipe.to_dict(),
        }


def on_device(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, moved to this process's GPU, if there is one."""
    return torch.nn.Module.to(model, PartialState().device if torch.cuda.is_available() else "cpu")


def hold_out(rows: Sequence[Any], recipe: Recipe) -> tuple[list[Any], list[Any]]:
    """(rows to train on, rows to calibrate on)."""
    shuffled = list(rows)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    if recipe.limit is not None:
        shuffled = shuffled[: recipe.limit]
    if len(shuffled) < 2:
        raise ValueError(f"{len(shuffled)} training rows: too few to hold some of them out")
    count = min(HELD_OUT_AT_MOST, max(1, math.floor(recipe.held_out * len(shuffled))))
    return shuffled[count:], shuffled[:count]


@torch.no_grad()  # not in inference mode: parameters that are moved there could not be trained any more
def lessons_of(
    model: PreTrainedModel, examples: Features, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Tensor], list[Tensor]]:
    """What a teacher makes of the examples, in their order; it moves to a GPU, if there is one.

    Returns:
        Logits fp32 [outputs] per example, or [2, tokens] (`logits_in`), and final states of its first token fp32 [d].
    """
    on_device(model).eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples.input_ids[i]))
    batches = padded_batches(examples, tokenizer, EVALUATION_BATCH, sort=True)
    found: list[tuple[Tensor, Tensor]] = []
    for batch in tqdm(batches, total=-(-len(order) // EVALUATION_BATCH), desc="teacher"):
        with final_states(model) as states:
            output = model(**inputs_of(batch, model))
        logits = logits_in(output).float().cpu()
        mask = batch["attention_mask"]
        first = states[0].float().cpu()[torch.arange(mask.size(0)), mask.argmax(1)]  # padding may be on the left
        for row, state, length in zip(logits, first, mask.sum(1).tolist(), strict=True):
            # What is per token comes without its padding.
            found.append((row[:, :length] if row.dim() == 2 else row, state))
    by_example = [lesson for _, lesson in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]
    return [logits for logits, _ in by_example], [state for _, state in by_example]
