"""One stage of training: rows become samples, samples become a table, the table is trained on and kept.

A stage is a set of values (`Stage`), not a code path: `train_stage` trains both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from qllava.config import InputError
from qllava.conversation import PLAIN, Template
from qllava.data.encode import IGNORE_INDEX, Encoder, Sample
from qllava.data.formats import Example
from qllava.models import ledger
from qllava.models.adapter import PROBES_FILE, read_record
from qllava.models.assemble import Assembled
from qllava.models.checkpoint import tokens_per_image
from qllava.training import scores
from qllava.training.settings import Settings, TrainConfig
from qllava.training.trainer import METRICS_FILE, LlavaTrainer, Metrics, checkpoints, saving, to_dataset

PROBES = 32


@dataclass(frozen=True)
class Stage:
    """What distinguishes one stage from the other."""

    name: str
    """`pretrain` or `finetune`, as it stands in metrics.jsonl."""
    title: str
    """For people."""
    template: Template
    """How its rows are written."""
    train: list[Example]
    """Its rows."""
    evaluation: list[Example]
    """Held-out rows."""
    folder: Path
    """Where it is written."""
    config: TrainConfig
    """The loop's settings."""


class Progress(TrainerCallback):
    """A bar of steps with the loss, and what is left."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the bar."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit=" steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Show the numbers that people look at."""
        shown = {"loss": "loss", "eval_loss": "held-out loss", "eval_exact_match": "exact match"}
        found = {label: f"{logs[key]:.3f}" for key, label in shown.items() if logs and key in logs}
        if found and self.bar is not None:
            self.bar.set_postfix(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the bar where it is."""
        self.close()

    def close(self) -> None:
        """End the bar's line, so that what is said next begins a new one."""
        if self.bar is not None:
            self.bar.close()


def train_stage(stage: Stage, model: nn.Module, assembled: Assembled, settings: Settings) -> dict[str, float]:
    """Train one stage into its folder, from its newest checkpoint if it has one; returns the last held-out figures."""
    encoder = Encoder(
        assembled.processor.tokenizer,
        stage.template,
        assembled.model.config.image_token_index,
        tokens_per_image(assembled.model.config),
        stage.config.max_length or 1 << 30,
        settings.data.too_long,  # type: ignore[arg-type]
    )
    encoded = encoder.encode_all(stage.train, progress=True)
    if not encoded.samples:
        raise InputError(f"No sample is left to train on: all {len(stage.train)} are longer than max_length; raise it.")
    held_out = encoder.encode_all(stage.evaluation).samples if stage.evaluation else []
    _settle_evaluation(stage.config, bool(held_out))
    questions = scores.spaced(stage.evaluation, stage.config.eval_questions)
    progress = Progress(stage.title)
    trainer = LlavaTrainer(
        model,
        assembled,
        stage.config,
        train=to_dataset(encoded.samples),
        evaluation=to_dataset(held_out) if held_out else None,
        exact_match=_exact_match(model, assembled, questions) if questions and stage.template is not PLAIN else None,
        callbacks=[Metrics(stage.folder / METRICS_FILE, stage.name), progress],
    )
    for other in (PrinterCallback, ProgressCallback):  # `Progress` is the one bar
        trainer.remove_callback(other)
    ledger.check(model)
    text = _ledger_text(model, stage, encoded.samples, encoded.dropped, encoded.trimmed)
    print(f"\n{text}\n")
    (stage.folder / "ledger.txt").write_text(text + "\n", encoding="utf-8")
    newest = _newest(stage.folder, assembled)
    if newest:
        print(f"Continuing from {newest}.")
    with saving(f"{stage.folder / PROBES_FILE}"):
        # Before the first step: a checkpoint of a run that never ended can be merged and verified too.
        save_probes(stage.folder / PROBES_FILE, held_out or encoded.samples, trainer.data_collator)
    if stage.config.gradient_checkpointing:
        model.train()
    try:
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    finally:
        progress.close()
    model.eval()
    last = trainer.evaluate() if held_out else {}
    with saving(f"The result {stage.folder}"):
        trainer.save_model(str(stage.folder))
    return {key: value for key, value in last.items() if key in ("eval_loss", "eval_exact_match")}


def _settle_evaluation(config: TrainConfig, held_out: bool) -> None:
    """Without held-out rows nothing is measured during the run; transformers would refuse it with a stack trace."""
    if not held_out and config.eval_strategy != "no":
        print("No eval_file: nothing is measured during the run.")
        config.eval_strategy, config.do_eval = "no", False


def _newest(folder: Path, assembled: Assembled) -> Path | None:
    """The newest checkpoint of a run. Raises InputError when it is one of another base."""
    found = checkpoints(folder)
    if not found:
        return None
    if read_record(found[-1]).fingerprint != assembled.recipe.fingerprint:
        base = assembled.recipe.model or assembled.recipe.language_model
        raise InputError(
            f"{found[-1]} was trained on another base than {base}; give the base that the run began with, or choose "
            "another output_dir."
        )
    return found[-1]


def save_probes(path: Path, samples: Sequence[Sample], collator: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Keep rows as the model gets them, evenly spaced: `qllava merge` compares what it wrote on them."""
    tensors: dict[str, torch.Tensor] = {}
    for number, row in enumerate(to_dataset(scores.spaced(samples, PROBES))):
        batch = collator([row])
        for key in ("input_ids", "labels"):
            tensors[f"{number}.{key}"] = batch[key][0]
        if "pixel_values" in batch:
            tensors[f"{number}.pixel_values"] = batch["pixel_values"]
    save_file(tensors, path)


def _exact_match(model: nn.Module, assembled: Assembled, questions: list[Example]) -> Callable[[], float]:
    return lambda: scores.exact_match(model, assembled, questions)


def _ledger_text(
    model: nn.Module, stage: Stage, samples: Sequence[Sample], dropped: Sequence[str], trimmed: Sequence[str]
) -> str:
    """The ledger of the model, and what the data comes to."""
    config = stage.config
    rates = {"LoRA": config.learning_rate or 0.0, "projector": config.learning_rate or 0.0}
    if config.projector_lr is not None and stage.name == "finetune":
        rates["projector"] = config.projector_lr
    lengths = sorted(len(s.input_ids) for s in samples)
    learned = sum(label != IGNORE_INDEX for s in samples for label in s.labels)
    lines = [
        stage.title,
        ledger.format_ledger(ledger.ledger(model), rates),
        f"samples {len(samples):,} (dropped {len(dropped)}, trimmed {len(trimmed)}); template {stage.template.name}; "
        f"tokens median {lengths[len(lengths) // 2]}, most {lengths[-1]}; learned {learned:,} of {sum(lengths):,}",
    ]
    return "\n".join(lines)
