"""A run: one command, one folder. Both recipes are thin calls of `pretrain` and `finetune`.

    parts -> assemble -> [stage 1: captions, projector] -> [stage 2: conversations, projector + LoRA] -> table, report

The same command again continues an unfinished run at its newest checkpoint; a finished one is refused.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from qllava.arguments import explain
from qllava.config import NANO, InputError
from qllava.conversation import PLAIN, TEMPLATES, Template
from qllava.data.encode import Encoder
from qllava.files import Journal, write_whole
from qllava.image_layout import ImageLayout
from qllava.models.adapter import (
    BELONGS_TO_BASE,
    adapter_at,
    add_lora,
    continue_adapter,
    load_projector,
    train_projector_only,
)
from qllava.models.assemble import Assembled, assemble
from qllava.models.bases import at_its_base, located
from qllava.models.errors import one_line, out_of_memory
from qllava.models.lora import Lora
from qllava.models.positions import positions_of
from qllava.models.record import Recipe
from qllava.runs import BEGUN_FILE, METRICS_FILE, REPORT_FILE, SPIKES_FILE, Run
from qllava.surroundings import prepare_process
from qllava.training import evaluations, folders, outcome, samples, scores
from qllava.training.asked import HeldOut
from qllava.training.data import Part, Prepared, hashes_of, prepare
from qllava.training.durable import disk, processes
from qllava.training.durable.checkpoints import begun_with, refuse_changes
from qllava.training.durable.order import total_steps
from qllava.training.durable.signals import Stopped, handled
from qllava.training.memory.allocator import keep_freed_memory
from qllava.training.nano_start import take_projector
from qllava.training.options.defaults import FINETUNE_RATE, NANO_PRETRAIN, PRETRAIN_RATE, PROJECTOR_RATE
from qllava.training.settings import Settings, TrainConfig
from qllava.training.stage import Stage, train_stage


def pretrain(settings: Settings) -> Path:
    """Stage 1 alone: the projector learns from captions. Returns the run's folder."""
    with ExitStack() as held:
        return _pretrain(settings, held)


def _pretrain(settings: Settings, held: ExitStack) -> Path:
    folder = folders.open_folder(settings, held)
    started = outcome.Started(folder, held)
    files = folders.files_of(settings.data.train_file, settings, "train_file", nano_file="pretrain")
    held_out = folders.held_out(settings, stage1=True)
    evaluations.refuse_unmeasured(settings.train, bool(held_out))
    begun = processes.by_main(partial(_begin, settings, folder, files))
    started.keep()
    assembled = _assemble(settings)
    template = TEMPLATES[settings.model.template] if settings.model.template else PLAIN
    train, evaluation = _prepare(settings, assembled, template, files, held_out)
    config = _with_rates(settings.train, PRETRAIN_RATE)
    stage = Stage("pretrain", "Stage 1", template, train, evaluation, [], folder, config, begun, saved=started.keep)
    trained = train_stage(stage, train_projector_only(assembled), assembled)
    results = {"seconds": started.seconds, **trained}
    processes.by_main(partial(folders.finish, folder, results))
    folders.say_next(
        f"Stage 1 is done: {folder} (open {folder / REPORT_FILE} in a browser)", outcome.next_commands(folder)
    )
    return folder


def _begin(settings: Settings, folder: Path, files: list[Part]) -> dict[str, Any]:
    begun = begun_with(settings, train_file=hashes_of(files))
    refuse_changes(folder, begun)
    folders.write_settings(settings, folder)
    return begun


def finetune(settings: Settings) -> Path:
    """Both stages, or the second alone where a projector is given. Returns the run's folder."""
    with ExitStack() as held:
        return _finetune(settings, held)


def _finetune(settings: Settings, held: ExitStack) -> Path:
    start = adapter_at(settings.model.model_name_or_path)
    folder = folders.open_folder(settings, held)
    started = outcome.Started(folder, held)
    take_projector(settings, folder)
    # Before the model, which may be a download of 14 GB.
    files = folders.files_of(settings.data.train_file, settings, "train_file", nano_file="train")
    held_out = folders.held_out(settings)
    evaluations.refuse_unmeasured(settings.train, bool(held_out))
    begun = processes.by_main(partial(folders.begin, settings, folder, files, held_out))
    started.keep()
    assembled = _assemble(settings, start)
    room = scores.room_for(settings.train)
    table = scores.Table.open(folder, assembled, room) if settings.nanos_own else None
    # All data is looked at before anything is trained: also that of the second stage before the first.
    captions = _captions(settings, assembled, folder)
    train, evaluation = _prepare(settings, assembled, assembled.template, files, held_out)
    if table:
        table.measure("untrained", assembled.model)
    _align(settings, assembled, folder, captions, begun, len(train.lengths), started)
    if table:
        table.measure("stage1", assembled.model)
    model = _with_lora(settings, assembled, start)
    asked = HeldOut(held_out, evaluation)
    shown = asked.spaced(scores.shown(settings.train))
    before = samples.before(folder, model, assembled, shown, room)
    config = _with_rates(settings.train, FINETUNE_RATE, PROJECTOR_RATE)
    questions = asked.spaced(config.eval_questions)
    final = [] if table else asked.drawn(config.eval_questions_final, config.seed)
    stage = Stage(
        "finetune", "Stage 2", assembled.template, train, evaluation, questions, folder, config, begun, final,
        saved=started.keep,
    )  # fmt: skip
    trained = train_stage(stage, model, assembled)
    after = scores.answers(model, assembled, shown, room) if shown else []
    measured = table.finish(model) if table else {}
    results = {**measured, "seconds": started.seconds, **trained}
    processes.by_main(partial(samples.write, folder, shown, before, after))
    processes.by_main(partial(folders.finish, folder, results))
    if table:
        print("\n" + scores.format_table(measured))
    _say_done(folder, results)
    return folder


def _with_lora(settings: Settings, assembled: Assembled, start: Path | None) -> Any:
    """The model with LoRA: a new one that changes nothing yet, or that of an adapter."""
    set_seed(settings.train.seed)  # LoRA begins alike whether stage 1 was trained in this process or in one before
    model = add_lora(assembled, Lora.of_settings(settings.model))
    if start:
        continue_adapter(model, start)
    return model


def _say_done(folder: Path, results: dict[str, Any]) -> None:
    """Print what a finished run came to, and what it may be used for next."""
    print("\nResult")
    for label, value in outcome.figures(folder, results):
        print(f"  {label:<19}{value}")
    folders.say_next(
        f"The run is done: {folder} (open {folder / REPORT_FILE} in a browser)", outcome.next_commands(folder)
    )


def _captions(settings: Settings, assembled: Assembled, folder: Path) -> Prepared | None:
    """What a stage 1 of finetune's own would learn from; None where the projector has its start already."""
    exists = settings.model.model_name_or_path not in (None, NANO) and not settings.data.pretrain_file
    if settings.model.projector or exists or processes.by_main(lambda: Run(folder).stage1.finished):
        return None
    files = folders.files_of(settings.data.pretrain_file, settings, "pretrain_file", nano_file="pretrain")
    return _prepare(settings, assembled, PLAIN, files, [])[0]


def _align(
    settings: Settings,
    assembled: Assembled,
    folder: Path,
    captions: Prepared | None,
    begun: dict[str, Any],
    count: int,
    started: outcome.Started,
) -> None:
    """Give the projector its start: a folder's, or a stage 1 of its own; a LLaVA that exists already has one.

    count: samples of stage 2, whose files have to fit on the disk before stage 1 begins.
    """
    stage1 = Run(folder).stage1.folder
    if captions is None:
        if settings.model.projector:
            load_projector(assembled.model, Path(settings.model.projector))
        elif Run(stage1).finished:
            load_projector(assembled.model, stage1)
        return
    processes.by_main(partial(stage1.mkdir, exist_ok=True))
    config = copy.copy(settings.train)
    config.output_dir = str(stage1)
    config.learning_rate = PRETRAIN_RATE
    evaluations.leave_out(config)  # eval_file is for stage 2
    if settings.model.is_nano:
        for name, value in NANO_PRETRAIN.items():
            setattr(config, name, value)
        config.per_device_train_batch_size = max(1, config.per_device_train_batch_size // config.world_size)
    stage = Stage("pretrain", "Stage 1", PLAIN, captions, None, [], stage1, config, begun, saved=started.keep)
    model, tokenizer = assembled.model, assembled.processor.tokenizer
    lora = Lora.of_settings(settings.model).parameters(model)
    needs = {
        stage1: disk.needed(model, config, tokenizer, len(captions.lengths), lora=0),
        folder: disk.needed(model, settings.train, tokenizer, count, lora=lora),
    }
    processes.by_main(partial(disk.check, needs))
    number = len(captions.lengths)
    print(f"Stage 1: {total_steps(config, number):,} steps on {number:,} captions; the bar shows the time left.")
    train_stage(stage, train_projector_only(assembled), assembled)
    assembled.model.requires_grad_(False)
    processes.by_main(partial(_keep, stage1, folder, started.seconds, begun))
    started.keep()


def _keep(stage1: Path, folder: Path, seconds: float, begun: dict[str, Any]) -> None:
    """Finish the folder of a stage 1, and copy what it logged into that of the run.

    seconds: of the run so far, in all its starts.
    """
    write_whole(stage1 / BEGUN_FILE, json.dumps({"begun_with": begun}, indent=1) + "\n")
    # Before it counts as finished: killed in between, both come twice, and the report reads a step once.
    for name in (METRICS_FILE, SPIKES_FILE):
        if (stage1 / name).is_file():
            with Journal(stage1 / name) as said, Journal(folder / name) as journal:
                journal.append(b"".join(said.lines()))
    folders.finish(stage1, {"seconds": seconds})


def _assemble(settings: Settings, start: Path | None = None) -> Assembled:
    """The model of the settings, or the base of an adapter; that they fit together is known (`before.py`)."""
    set_seed(settings.train.seed)
    if not torch.cuda.is_available():
        keep_freed_memory()
    if start:
        with at_its_base(start):
            return assemble(_same_base(settings, start), seed=settings.train.seed)
    return assemble(Recipe.of_settings(settings.model), seed=settings.train.seed)


def _same_base(settings: Settings, start: Path) -> Recipe:
    """The base of an adapter that is trained on. Raises InputError for a setting that would make it another one."""
    record = located(start, settings.model.base_model or ())
    for name in BELONGS_TO_BASE:
        if getattr(settings.model, name) != getattr(record, name):
            raise InputError(
                f"The adapter in {start} was trained with {name} {getattr(record, name)}; leave the setting out, or "
                "merge the run and start from the merged model."
            )
    # What the base is held in is this device's matter.
    return replace(record, dtype="")


def _with_rates(config: TrainConfig, rate: float, projectors: float | None = None) -> TrainConfig:
    """The settings with the stage's own learning rates where none were given; stage 1 has one alone."""
    config = copy.copy(config)
    config.learning_rate = rate if config.learning_rate is None else config.learning_rate
    config.projector_lr = projectors if config.projector_lr is None else config.projector_lr
    return config


def _prepare(
    settings: Settings, assembled: Assembled, template: Template, files: list[Part], held_out: list[Part]
) -> tuple[Prepared, Prepared | None]:
    """Check and open the rows, as this model reads them."""
    encoder = Encoder(
        assembled.processor.tokenizer,
        template,
        assembled.model.config.image_token_index,
        ImageLayout.of_config(assembled.model.config),
        settings.train.max_length or 1 << 30,
        settings.data.too_long,  # type: ignore[arg-type]
        positions_of(assembled.model.config.text_config),
    )
    call = partial(
        prepare,
        files,
        encoder,
        seed=settings.train.seed,
        evaluation=held_out,
        skip_check=settings.data.skip_check,
        workers=settings.train.dataset_num_proc,
    )
    return processes.main_first(call)


def main(run: Callable[[Settings], Path], settings: Callable[[], Settings]) -> int:
    """Run a recipe: errors that a user can mend are one sentence on stderr and status 1, signals have their own."""
    prepare_process()
    try:
        with handled():
            with processes.meeting():
                chosen = settings()
            with processes.one_voice():
                run(chosen)
    except Stopped as stopped:
        if processes.speaks():
            print(f"qllava: {stopped}", file=sys.stderr)
        return stopped.status
    except processes.Elsewhere:
        return 1
    except InputError as error:
        # One that was raised in a worker of the data loader comes with its stack trace as text, the message last.
        sentence = str(error).splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")
        print(f"qllava: {sentence}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(
            f"qllava: Memory ran out ({one_line(error)}). Checkpoints are untouched. Lower fit_memory, max_length or "
            "lora_r, or see what `qllava plan` proposes; then give the command again.",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        print(f"qllava: {explain(error)}", file=sys.stderr)
        return 1
    return 0
