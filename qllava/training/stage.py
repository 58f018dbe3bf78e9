"""One stage of training: train on prepared samples, and save the result.

A stage is a set of values (`Stage`), not a code path: `train_stage` trains both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn
from transformers import PrinterCallback, ProgressCallback

from qllava.config import InputError
from qllava.data.collate import Collator
from qllava.data.formats import Example
from qllava.evaluation.vqa import VqaResult
from qllava.files import whole_file, write_whole
from qllava.models import ledger
from qllava.models.adapter import BELONGS_TO_BASE, read_record
from qllava.models.assemble import Assembled
from qllava.models.errors import UNPICKLING_REFUSED
from qllava.runs import LEDGER_FILE, METRICS_FILE, PROBES_FILE, Run
from qllava.training import scores
from qllava.training.callbacks import Begin, Metrics, Progress, Saved
from qllava.training.durable import disk, processes
from qllava.training.durable.checkpoints import computed_in, newest, saving
from qllava.training.durable.numbers import check_weights
from qllava.training.durable.signals import SaveAndStop, Stopped, handled
from qllava.training.evaluations import settle
from qllava.training.fitting import fitted
from qllava.training.memory.rehearsal import state_bytes
from qllava.training.stages import Stage
from qllava.training.trainer import LlavaTrainer

PROBES = 32


def train_stage(stage: Stage, model: nn.Module, assembled: Assembled) -> dict[str, Any]:
    """Train one stage into its folder, from its newest checkpoint if it has one.

    Returns:
        Training speed and held-out figures, for results.json.
    """
    settle(stage.config, stage.train, stage.evaluation, len(stage.questions))
    _check_lengths(stage, assembled)
    start = processes.by_main(partial(_start, stage.folder, assembled))
    stage, memory = fitted(stage, model, assembled, start)
    # One `Room` for all evaluations, so that a batch size that does not fit is tried only once.
    room = scores.room_for(stage.config)
    ask = partial(scores.exact_match, model, assembled, room=room)
    trainer = _trainer(stage, model, assembled, start, ask)
    room.beside = lambda: state_bytes(trainer.optimizer)
    _write_before(stage, trainer, memory)
    if start is not None:
        processes.by_main(partial(trainer.check_start, start))
    trainer.writer.passed_over = Run(stage.folder).checkpoints(after=start)
    seconds = _steps(stage, trainer, start)
    _save(stage, trainer, model)
    speed = {"tokens_per_second": round(trainer.tokens_seen / seconds, 1)}
    return {**speed, **(_measured(trainer, stage, ask) if stage.evaluation else {})}


def _trainer(
    stage: Stage,
    model: nn.Module,
    assembled: Assembled,
    start: Path | None,
    ask: Callable[[Sequence[Example]], VqaResult],
) -> LlavaTrainer:
    """Return the trainer before its first step, with the callbacks that write metrics and prepare the start."""
    trainer = LlavaTrainer(
        model,
        assembled,
        stage,
        exact_match=partial(ask, stage.questions) if stage.questions else None,
        callbacks=[Metrics(stage.folder / METRICS_FILE, stage.kind.name)],
        kept=processes.by_main(partial(computed_in, start)) if start else {},
    )
    if processes.fsdp_asked() and not trainer.is_fsdp_enabled:
        raise InputError(
            "accelerate is configured for FSDP, which needs a GPU, and there is none. Use another configuration."
        )
    for other in (PrinterCallback, ProgressCallback):  # `Progress` is the only bar
        trainer.remove_callback(other)
    trainer.add_callback(Begin(trainer))
    ledger.check(model)
    return trainer


def _steps(stage: Stage, trainer: LlavaTrainer, start: Path | None) -> float:
    """Train every step after a checkpoint, or all; return the seconds of training, without evaluations.

    Raises:
        Stopped: A signal ended the training; the last step is saved.
        InputError: The checkpoint cannot be read.
    """
    progress, stop = Progress(stage.kind.title), SaveAndStop()
    for callback in (progress, stop, *([Saved(stage.saved)] if stage.saved else [])):
        trainer.add_callback(callback)
    if stage.config.gradient_checkpointing:
        trainer.model.train()
    began = time.monotonic()
    try:
        with handled(stop.ask):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
            if (signal := stop.agree()) is not None:
                trainer.save_now()  # for a signal after the last step
                raise Stopped(signal, trainer.state.global_step)
    except UNPICKLING_REFUSED as error:
        raise InputError(
            f"{start} contains pickled objects, which qllava never loads. Remove it; the same command then "
            "resumes from the checkpoint before it."
        ) from error
    finally:
        progress.close()
    return time.monotonic() - began - trainer.evaluating


def _save(stage: Stage, trainer: LlavaTrainer, model: nn.Module) -> None:
    """Write the trained weights into the stage's folder, or raise NotFinite if a weight is not finite."""
    model.eval()
    check_weights(model, trainer.state.global_step)
    with processes.together(), saving(f"The result {stage.folder}"):
        trainer.save_model(str(stage.folder))


def _measured(trainer: LlavaTrainer, stage: Stage, ask: Callable[[Sequence[Example]], VqaResult]) -> dict[str, Any]:
    """Return the held-out figures of the trained model for results.json: the loss, and the score of the questions."""
    last = trainer.evaluate_last(partial(ask, stage.final) if stage.final else None)
    found: dict[str, Any] = {"eval_loss": last["eval_loss"]}
    if stage.final:
        found |= {"eval_exact_match": last["eval_exact_match"], "n": int(last["eval_exact_match_n"])}
        found["ci95"] = [last["eval_exact_match_low"], last["eval_exact_match_high"]]
    return found


def _write_before(stage: Stage, trainer: LlavaTrainer, memory: list[str]) -> None:
    """Print and write what is known before the first step, after checking that the files fit on the disk."""
    assembled = trainer.assembled
    if halved := trainer.pack_step.halved:
        memory = [*memory, f"packs have at most {halved:,} tokens, because memory ran out with longer packs"]
    text = "\n".join([*_ledger_lines(stage, trainer), *memory])
    print(f"\n{text}\n")
    need = disk.needed(trainer.model, stage.config, assembled.processor.tokenizer, len(stage.train.lengths))
    processes.by_main(partial(disk.check, {stage.folder: need}))
    processes.by_main(partial(_open, stage, assembled, text))


def _open(stage: Stage, assembled: Assembled, text: str) -> None:
    write_whole(stage.folder / LEDGER_FILE, text + "\n")
    with saving(f"{stage.folder / PROBES_FILE}"):
        # Before the first step, so that a checkpoint of a run that never finished can be merged and verified too.
        save_probes(stage.folder / PROBES_FILE, (stage.evaluation or stage.train).dataset, assembled)


def _check_lengths(stage: Stage, assembled: Assembled) -> None:
    """Raise an InputError if a sample exceeds a pack, or the attention window of the language model."""
    longest, most = int(stage.train.lengths.max()), stage.config.tokens_per_pack
    if most is not None and longest > most:
        raise InputError(
            f"The longest sample has {longest} tokens, but tokens_per_pack is {most}. Raise tokens_per_pack "
            f"to {longest}, or lower max_length and set too_long."
        )
    window = getattr(assembled.model.config.text_config, "sliding_window", None)
    if window is not None and longest > window:
        raise InputError(
            f"The longest sample has {longest} tokens, but the attention window of this language model has {window}. "
            f"Lower max_length to {window} and set too_long."
        )


def _start(folder: Path, assembled: Assembled) -> Path | None:
    """Return the checkpoint to resume from and print it with the skipped ones; raise InputError for another base."""
    found, skipped = newest(folder)
    for line in skipped:
        print(line)
    if found is None:
        if skipped:
            print("No intact checkpoint found; restarting the stage.")
        return None
    before, now = read_record(found), assembled.recipe
    other = [name for name in ("fingerprint", *BELONGS_TO_BASE) if getattr(before, name) != getattr(now, name)]
    if other:
        raise InputError(
            f"{found} was trained on another base than {now.model or now.language_model} (another {other[0]}). "
            "Use the base and settings that the run started with, or choose another output_dir."
        )
    print(f"Resuming from {found}.")
    return found


def save_probes(path: Path, samples: Dataset, assembled: Assembled) -> None:
    """Save evenly spaced samples as model inputs, on which `qllava merge` compares the merged model."""
    collator = Collator(assembled.processor.tokenizer.pad_token_id, assembled.processor.image_processor)
    tensors: dict[str, torch.Tensor] = {}
    for number, index in enumerate(scores.spaced(range(len(samples)), PROBES)):
        batch = collator([samples[index]])
        for key in ("input_ids", "labels"):
            tensors[f"{number}.{key}"] = batch[key][0]
        if "pixel_values" in batch:
            tensors[f"{number}.pixel_values"] = batch["pixel_values"]
    with whole_file(path) as aside:  # merging a checkpoint needs it, even if this start is killed
        save_file(tensors, aside)


def _ledger_lines(stage: Stage, trainer: LlavaTrainer) -> list[str]:
    """Return the model's ledger, the size of the data, and the kernels used."""
    data, lengths = stage.train, np.sort(stage.train.lengths)
    rates = {"LoRA": stage.config.learning_rate or 0.0, "projector": stage.projector_rate}
    return [
        stage.kind.title,
        ledger.format_ledger(ledger.ledger(trainer.model), rates),
        f"samples {len(lengths):,} (dropped {data.count('dropped')}, trimmed {data.count('trimmed')}); "
        f"template {stage.template.name}; tokens median {lengths[len(lengths) // 2]}, most {lengths[-1]}; "
        f"learned {data.learned:,} of {lengths.sum():,}",
        trainer.kernels.line(),
    ]
