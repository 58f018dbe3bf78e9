"""One stage of training: rows that were prepared are trained on, and what was learned is kept.

A stage is a set of values (`Stage`), not a code path: `train_stage` trains both.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from qllava.config import InputError
from qllava.conversation import Template
from qllava.data.collate import Collator
from qllava.data.formats import Example
from qllava.evaluation.vqa import VqaResult
from qllava.files import whole_file, write_whole
from qllava.models import ledger
from qllava.models.adapter import BELONGS_TO_BASE, read_record
from qllava.models.assemble import Assembled
from qllava.models.errors import UNPICKLING_REFUSED
from qllava.models.lora import Lora
from qllava.runs import LEDGER_FILE, METRICS_FILE, PROBES_FILE, Run
from qllava.training import scores
from qllava.training.data import Prepared
from qllava.training.durable import disk, processes
from qllava.training.durable.checkpoints import computed_in, newest, optim_of, saving
from qllava.training.durable.numbers import check_weights
from qllava.training.durable.signals import SaveAndStop, Stopped, handled
from qllava.training.durable.zero import read_tensors_only
from qllava.training.evaluations import settle
from qllava.training.memory import fit, format_bytes, parse_bytes, recompute, settled, setup_of
from qllava.training.settings import TrainConfig
from qllava.training.step.attention import Kernel
from qllava.training.step.kernels import Chosen, Layers
from qllava.training.trainer import LlavaTrainer, Metrics, computing_in

PROBES = 32


@dataclass(frozen=True)
class Stage:
    """What distinguishes one stage from the other."""

    name: str
    """`pretrain` or `finetune`, as in metrics.jsonl."""
    title: str
    """For people."""
    template: Template
    """How its rows are written."""
    train: Prepared
    """Its rows."""
    evaluation: Prepared | None
    """Held-out rows."""
    questions: list[Example]
    """Some of the held-out rows, to be answered during the run."""
    folder: Path
    """Where it is written."""
    config: TrainConfig
    """The loop's settings."""
    begun_with: dict[str, Any]
    """What decides the run (`checkpoints.begun_with`): kept with every checkpoint."""
    final: Sequence[Example] = ()
    """Held-out rows whose questions are answered when training has ended."""
    saved: Callable[[], None] | None = None
    """Called after each checkpoint."""


class Begin(TrainerCallback):
    """What is settled when transformers has prepared the model: recomputation, and on a GPU a rehearsal."""

    def __init__(self, lengths: np.ndarray, pictures: np.ndarray) -> None:
        self.lengths, self.pictures = lengths, pictures
        self.trainer: LlavaTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first step."""
        assert self.trainer is not None
        if args.recompute_layers is not None:
            llava: Any = self.trainer.assembled.model
            recompute(llava.model.language_model, args.recompute_layers)
        if args.device.type == "cuda":
            self.trainer.rehearse(self.lengths, self.pictures)


class Saved(TrainerCallback):
    """Calls a function after each checkpoint."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The checkpoint is complete."""
        self.call()


class Progress(TrainerCallback):
    """A bar of steps with the loss, and what is left."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the bar."""
        hidden = not processes.is_main()
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.title, unit=" steps", disable=hidden
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Show the numbers that people look at."""
        shown = {"loss": "loss", "eval_loss": "held-out loss", "eval_exact_match": "exact match"}
        found = {label: f"{logs[key]:.3f}" for key, label in shown.items() if logs and key in logs}
        if logs and "eval_exact_match" in logs:
            low, high = (round(100 * logs[f"eval_exact_match_{end}"]) for end in ("low", "high"))
            found["exact match"] += f" of {int(logs['eval_exact_match_n'])} ({low}-{high} %)"
        if found and self.bar is not None:
            self.bar.set_postfix(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the bar where it is."""
        self.close()

    def close(self) -> None:
        """End the bar's line, so that what is said next begins a new one."""
        if self.bar is not None:
            self.bar.close()


def train_stage(stage: Stage, model: nn.Module, assembled: Assembled) -> dict[str, Any]:
    """Train one stage into its folder, from its newest checkpoint if it has one; returns speed and held-out figures."""
    held_out = stage.evaluation.dataset if stage.evaluation else None
    settle(stage.config, stage.train, stage.evaluation, len(stage.questions))
    _check_lengths(stage, assembled)
    start = processes.by_main(partial(_start, stage.folder, assembled))
    stage, memory = fitted(stage, model, assembled, start)
    saved = [Saved(stage.saved)] if stage.saved else []
    progress, begin, stop = Progress(stage.title), Begin(stage.train.lengths, stage.train.pictures), SaveAndStop()
    # One room for all evaluations: each size that did not fit is met once.
    room = scores.room_for(stage.config)
    ask = partial(scores.exact_match, model, assembled, room=room)
    trainer = LlavaTrainer(
        model,
        assembled,
        stage.config,
        train=stage.train.dataset,
        evaluation=held_out,
        pictures=stage.train.pictures,
        exact_match=partial(ask, stage.questions) if stage.questions else None,
        callbacks=[Metrics(stage.folder / METRICS_FILE, stage.name), begin, progress, stop, *saved],
        begun_with=stage.begun_with,
        kept=processes.by_main(partial(computed_in, start)) if start else {},
    )
    begin.trainer, room.beside = trainer, trainer.state_bytes
    if processes.fsdp_asked() and not trainer.is_fsdp_enabled:
        raise InputError("accelerate was told of FSDP and has none here, where no GPU is; take another configuration.")
    for other in (PrinterCallback, ProgressCallback):  # `Progress` is the one bar
        trainer.remove_callback(other)
    ledger.check(model)
    if trainer.halved:
        memory.append(f"rows have at most {trainer.halved:,} tokens, as they were halved to when memory ran out")
    text = "\n".join([*_ledger_lines(model, stage, trainer.kernel, trainer.layers), *memory])
    print(f"\n{text}\n")
    need = disk.needed(model, stage.config, assembled.processor.tokenizer, len(stage.train.lengths))
    processes.by_main(partial(disk.check, {stage.folder: need}))
    processes.by_main(partial(_open, stage, held_out, assembled, text))
    if start is not None:
        processes.by_main(partial(trainer.check_start, start))
    trainer.passed_over = Run(stage.folder).checkpoints(after=start)
    if stage.config.gradient_checkpointing:
        model.train()
    if trainer.is_deepspeed_enabled:
        read_tensors_only()
    began = time.monotonic()
    _train(trainer, start, stop, progress)
    seconds = time.monotonic() - began - trainer.evaluating
    speed = {"tokens_per_second": round(trainer.tokens_seen / seconds, 1)}
    model.eval()
    check_weights(model, trainer.state.global_step)
    with processes.together(), saving(f"The result {stage.folder}"):
        trainer.save_model(str(stage.folder))
    return {**speed, **(_measured(trainer, stage, ask) if held_out else {})}


def _measured(trainer: LlavaTrainer, stage: Stage, ask: Callable[[Sequence[Example]], VqaResult]) -> dict[str, Any]:
    """The held-out figures of the trained model, for results.json: the loss, and the score of the final questions."""
    last = trainer.evaluate_last(partial(ask, stage.final) if stage.final else None)
    found: dict[str, Any] = {"eval_loss": last["eval_loss"]}
    if stage.final:
        found |= {"eval_exact_match": last["eval_exact_match"], "n": int(last["eval_exact_match_n"])}
        found["ci95"] = [last["eval_exact_match_low"], last["eval_exact_match_high"]]
    return found


def _train(trainer: LlavaTrainer, start: Path | None, stop: SaveAndStop, progress: Progress) -> None:
    """Every step from a checkpoint on, or all of them. Raises Stopped when a signal has ended it."""
    try:
        with handled(stop.ask):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
            if (signal := stop.agree()) is not None:
                trainer.save_now()  # one that came after the last step
                raise Stopped(signal, trainer.state.global_step)
    except UNPICKLING_REFUSED as error:
        raise InputError(
            f"{start} holds more than tensors, and qllava unpickles nothing; remove it, and the same command continues "
            "from the one before."
        ) from error
    finally:
        progress.close()


def _open(stage: Stage, held_out: Dataset | None, assembled: Assembled, text: str) -> None:
    """Write what is known before the first step."""
    write_whole(stage.folder / LEDGER_FILE, text + "\n")
    with saving(f"{stage.folder / PROBES_FILE}"):
        # Before the first step: a checkpoint of a run that never ended can be merged and verified too.
        save_probes(stage.folder / PROBES_FILE, held_out or stage.train.dataset, assembled)


def _check_lengths(stage: Stage, assembled: Assembled) -> None:
    """A sample has to fit into a row, and into what the language model sees. Raises InputError."""
    longest, most = int(stage.train.lengths.max()), stage.config.tokens_per_row
    if most is not None and longest > most:
        raise InputError(
            f"The longest sample has {longest} tokens and tokens_per_row is {most}; raise it to {longest}, or lower "
            "max_length and choose too_long."
        )
    window = getattr(assembled.model.config.text_config, "sliding_window", None)
    if window is not None and longest > window:
        raise InputError(
            f"The longest sample has {longest} tokens and this language model looks back at {window}; lower max_length "
            "to that and choose too_long."
        )


def fitted(stage: Stage, model: Any, assembled: Assembled, start: Path | None = None) -> tuple[Stage, list[str]]:
    """Row size, recomputation and optimizer that fit the card, or `fit_memory`; what is set explicitly stays.

    start: the checkpoint that is continued from, whose optimizer stays too: the state of another is of no use to it.
    Raises InputError when nothing fits.
    """
    config, on_card = copy.copy(stage.config), torch.cuda.is_available()
    fixed = settled(config)
    if start is not None and (optim := optim_of(start)):
        config.optim = optim
        fixed.add("optim")
    stage = replace(stage, config=config)
    if not (on_card or config.fit_memory):
        return stage, []
    limits = [parse_bytes(config.fit_memory)] if config.fit_memory else []
    if on_card:  # a card sold with 8 GB has a little less
        limits.append(torch.cuda.mem_get_info()[1])
    # Unequal cards must not choose unequal packs or optimizers.
    limit = processes.lowest(min(limits))
    llava: Any = assembled.model
    setup = setup_of(config, llava.config, Lora.of_model(model), load_in_4bit=assembled.recipe.load_in_4bit)
    setup = replace(
        setup, device="cuda" if on_card else "cpu", dtype=computing_in(config, llava.dtype), held=llava.dtype
    )
    asking = scores.asking_of(config, setup.lora, held_out=stage.evaluation is not None)
    lengths = np.sort(stage.train.lengths)
    plan = fit(
        setup,
        limit,
        asking=asking,
        least_tokens=int(lengths[-1]),
        most_tokens=max(int(lengths[-config.per_device_train_batch_size :].sum()), int(lengths[-1])),
        fixed=fixed,
    )
    config.tokens_per_row, config.recompute_layers, config.optim = (
        plan.tokens_per_row,
        plan.recompute_layers,
        plan.optim,
    )
    # From here on `recompute_layers` decides.
    config.gradient_checkpointing = config.activation_checkpointing = False
    line = (
        f"memory: {format_bytes(plan.peak_bytes)} of {format_bytes(limit)} expected, with rows of "
        f"{plan.tokens_per_row:,} tokens, {plan.recompute_layers} layers recomputed, {plan.optim}"
    )
    return stage, [line]


def _start(folder: Path, assembled: Assembled) -> Path | None:
    """The checkpoint to continue from; says which, and which it passes over. Raises InputError for another base."""
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
            f"{found} was trained on another base than {now.model or now.language_model} (another {other[0]}); "
            "give the base and settings that the run began with, or choose another output_dir."
        )
    print(f"Continuing from {found}.")
    return found


def save_probes(path: Path, rows: Dataset, assembled: Assembled) -> None:
    """Keep rows as the model gets them, evenly spaced: `qllava merge` compares what it wrote on them."""
    collator = Collator(assembled.processor.tokenizer.pad_token_id, assembled.processor.image_processor)
    tensors: dict[str, torch.Tensor] = {}
    for number, index in enumerate(scores.spaced(range(len(rows)), PROBES)):
        batch = collator([rows[index]])
        for key in ("input_ids", "labels"):
            tensors[f"{number}.{key}"] = batch[key][0]
        if "pixel_values" in batch:
            tensors[f"{number}.pixel_values"] = batch["pixel_values"]
    with whole_file(path) as aside:  # a checkpoint's merge needs it, whenever this start is killed
        save_file(tensors, aside)


def _ledger_lines(model: nn.Module, stage: Stage, kernel: Chosen[Kernel], layers: Chosen[Layers]) -> list[str]:
    """The ledger of the model, what the data comes to, and how it is computed."""
    config, data = stage.config, stage.train
    rates = {"LoRA": config.learning_rate or 0.0, "projector": config.learning_rate or 0.0}
    if config.projector_lr is not None and stage.name == "finetune":
        rates["projector"] = config.projector_lr
    lengths = np.sort(data.lengths)
    return [
        stage.title,
        ledger.format_ledger(ledger.ledger(model), rates),
        f"samples {len(lengths):,} (dropped {data.count('dropped')}, trimmed {data.count('trimmed')}); "
        f"template {stage.template.name}; tokens median {lengths[len(lengths) // 2]}, most {lengths[-1]}; "
        f"learned {data.learned:,} of {lengths.sum():,}",
        f"attention by rows: {kernel.kernel} ({kernel.why}); norms and gates: {layers.kernel} ({layers.why})",
    ]
