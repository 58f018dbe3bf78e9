"""Initial projector of a finetune_lora run: from a finished stage 1 run, or from a stage 1 inside the run."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from qllava.config import NANO, OLDER_NANO, InputError
from qllava.conversation import PLAIN
from qllava.files import Journal, write_whole
from qllava.models.adapter import load_projector, read_record, train_projector_only
from qllava.models.assemble import Assembled
from qllava.models.card import base_of
from qllava.models.lora import Lora
from qllava.runs import BEGUN_FILE, METRICS_FILE, RECORD_FILE, SPIKES_FILE, Run
from qllava.training import evaluations, folders, outcome
from qllava.training.data import Prepared, prepare_for
from qllava.training.durable import disk, processes
from qllava.training.durable.order import total_steps
from qllava.training.options.defaults import NANO_PRETRAIN
from qllava.training.settings import Settings, TrainConfig
from qllava.training.stage import train_stage
from qllava.training.stages import ALIGNMENT, Stage


def captions_of(settings: Settings, assembled: Assembled, folder: Path) -> Prepared | None:
    """Return the captions of the run's own stage 1; None if the run needs no stage 1."""
    exists = settings.model.model_name_or_path not in (None, NANO) and not settings.data.pretrain_file
    if settings.model.projector or exists or processes.by_main(lambda: Run(folder).stage1.finished):
        return None
    files = folders.files_of(settings.data.pretrain_file, settings, "pretrain_file", nano_file="pretrain")
    return prepare_for(settings, assembled, PLAIN, files, [])[0]


def _load(assembled: Assembled, folder: Path) -> None:
    """Load the projector of a stage 1; print a note if it was trained on another base, which may be meant.

    Raises:
        InputError: The projector cannot be loaded, or was trained on another nano.
    """
    load_projector(assembled.model, folder)
    if not (folder / RECORD_FILE).is_file():
        return
    before, now = read_record(folder), assembled.recipe
    if before.fingerprint in ("", now.fingerprint):
        return
    if now.language_model == now.vision_tower == NANO and before.is_of_another_nano(now.fingerprint):
        raise InputError(f"The projector in {folder} {OLDER_NANO}")
    print(
        f"Note: the projector in {folder} was trained on another base ({base_of(before)}, fingerprint "
        f"{before.fingerprint}; this base has {now.fingerprint}). Its weights fit in shape; check that this is meant."
    )


def align(
    settings: Settings,
    assembled: Assembled,
    folder: Path,
    captions: Prepared | None,
    begun: dict[str, Any],
    count: int,
    started: outcome.Started,
) -> None:
    """Initialize the projector: load it from a run, or train it in a stage 1; an existing LLaVA has a trained one.

    Args:
        settings: Settings of the run.
        assembled: The model, whose projector is changed.
        folder: Folder of the run.
        captions: Result of `captions_of`.
        begun: Settings and data hashes that a resumed run must not change.
        count: Number of samples of stage 2, to check that its files fit on the disk before stage 1 starts.
        started: Timer of the run, saved after stage 1.
    """
    stage1 = Run(folder).stage1.folder
    if captions is None:
        if settings.model.projector:
            _load(assembled, Path(settings.model.projector))
        elif Run(stage1).finished:
            _load(assembled, stage1)
        return
    processes.by_main(partial(stage1.mkdir, exist_ok=True))
    config = _config(settings, stage1)
    stage = Stage(ALIGNMENT, PLAIN, captions, None, [], stage1, config, begun, saved=started.keep)
    model, tokenizer = assembled.model, assembled.processor.tokenizer
    lora = Lora.of_settings(settings.model).parameters(model)
    needs = {
        stage1: disk.needed(model, config, tokenizer, len(captions.lengths), lora=0),
        folder: disk.needed(model, settings.train, tokenizer, count, lora=lora),
    }
    processes.by_main(partial(disk.check, needs))
    number = len(captions.lengths)
    print(f"Stage 1: {total_steps(config, number):,} steps on {number:,} captions. The bar shows the remaining time.")
    train_stage(stage, train_projector_only(assembled), assembled)
    assembled.model.requires_grad_(False)
    processes.by_main(partial(_keep, stage1, folder, started.seconds, begun))
    started.keep()


def _config(settings: Settings, stage1: Path) -> TrainConfig:
    """Return the loop's settings of a stage 1 inside the run: those of the run without the ones of stage 2."""
    config = copy.copy(settings.train)
    config.output_dir = str(stage1)
    config.learning_rate = ALIGNMENT.rates["learning_rate"]
    evaluations.leave_out(config)  # eval_file is for stage 2
    if settings.model.is_nano:
        for name, value in NANO_PRETRAIN.items():
            setattr(config, name, value)
        config.per_device_train_batch_size = max(1, config.per_device_train_batch_size // config.world_size)
    return config


def _keep(stage1: Path, folder: Path, seconds: float, begun: Mapping[str, Any]) -> None:
    """Finish the folder of a stage 1, and copy its logs to the run's folder.

    Args:
        stage1: Folder of the stage 1.
        folder: Folder of the run.
        seconds: Duration of the run so far, over all its starts.
        begun: Settings and data of the run.
    """
    write_whole(stage1 / BEGUN_FILE, json.dumps({"begun_with": begun}, indent=1) + "\n")
    # Before stage 1 counts as finished: if killed in between, the logs are copied twice, and the report merges steps.
    for name in (METRICS_FILE, SPIKES_FILE):
        if (stage1 / name).is_file():
            with Journal(stage1 / name) as said, Journal(folder / name) as journal:
                journal.append(b"".join(said.lines()))
    folders.finish(stage1, {"seconds": seconds})
