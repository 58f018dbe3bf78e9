"""A run: one command, one folder. Both recipes are thin calls of `pretrain` and `finetune`.

    parts -> assemble -> [stage 1: captions, projector] -> [stage 2: conversations, projector + LoRA] -> table, report

The same command again continues an unfinished run at its newest checkpoint; a finished one is refused.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import set_seed

from qllava.config import NANO, InputError
from qllava.conversation import PLAIN, TEMPLATES, Template
from qllava.data.encode import Encoder
from qllava.data.formats import Example, read_some
from qllava.models.adapter import (
    BELONGS_TO_BASE,
    DATA_FILE,
    adapter_at,
    add_lora,
    continue_adapter,
    load_projector,
    read_record,
    train_projector_only,
)
from qllava.models.assemble import Assembled, assemble
from qllava.models.card import RESULTS_FILE, write_card
from qllava.models.checkpoint import tokens_per_image
from qllava.models.outline import Recipe
from qllava.nano import dataset as nano
from qllava.training import scores
from qllava.training.allocator import keep_freed_memory
from qllava.training.checkpoints import begun_with, refuse_changes
from qllava.training.data import Part, Prepared, hashes_of, parts_of, prepare
from qllava.training.report import write_report
from qllava.training.settings import Settings, TrainConfig
from qllava.training.signals import Stopped, handled
from qllava.training.stage import Stage, train_stage
from qllava.training.trainer import METRICS_FILE

ABOUT_ADAPTER = (
    "LoRA and projector of a LLaVA, tuned with qllava. `qllava chat {folder}` asks the base with this adapter, which "
    "is what was trained; `qllava merge {folder} merged` makes a model of it that needs no adapter."
)


def pretrain(settings: Settings) -> Path:
    """Stage 1 alone: the projector learns from captions. Returns the run's folder."""
    for name, given in (("projector", settings.model.projector), ("pretrain_file", settings.data.pretrain_file)):
        if given:
            raise InputError(f"The setting {name} is one of finetune_lora; stage 1 learns from train_file, remove it.")
    if start := adapter_at(settings.model.model_name_or_path):
        raise InputError(f"{start} is an adapter, whose projector has learned; train it on with finetune_lora.")
    folder = _open_folder(settings)
    started = time.monotonic()
    files = _files(settings.data.train_file, settings, "train_file", nano_file="pretrain")
    begun = begun_with(settings, hashes_of(files))
    refuse_changes(folder, begun)
    _write_settings(settings, folder)
    assembled = _assemble(settings)
    template = TEMPLATES[settings.model.template] if settings.model.template else PLAIN
    held_out = parts_of(settings.data.eval_file, _images(settings), "eval_file") if settings.data.eval_file else []
    train, evaluation = _prepare(settings, assembled, template, files, held_out)
    config = _with_rate(settings.train, 1e-3)
    stage = Stage("pretrain", "Stage 1", template, train, evaluation, [], folder, config, begun)
    trained = train_stage(stage, train_projector_only(assembled), assembled)
    _finish(folder, {"seconds": round(time.monotonic() - started, 1), **trained})
    _say_next(
        f"Stage 1 is done: {folder}",
        [
            f"python recipes/finetune_lora.py --projector {folder} ...   tune on your conversations",
            f"open {folder / 'report.html'}",
        ],
    )
    return folder


def finetune(settings: Settings) -> Path:
    """Both stages, or the second alone where a projector is given. Returns the run's folder."""
    model_, data = settings.model, settings.data
    if (model_.language_model or model_.vision_tower) and not (model_.projector or data.pretrain_file):
        raise InputError(
            "A new LLaVA's projector has learned nothing yet: give projector (the folder that pretrain_projector "
            "wrote) or pretrain_file."
        )
    start = adapter_at(model_.model_name_or_path)
    if start and (model_.projector or data.pretrain_file):
        raise InputError(
            f"The adapter in {start} brings its own projector; leave projector and pretrain_file out, or start from "
            "the base."
        )
    if model_.projector and data.pretrain_file:
        raise InputError("The projector is either given or learned from pretrain_file; remove one of the two settings.")
    folder = _open_folder(settings)
    started = time.monotonic()
    # Before the model, which may be a download of 14 GB.
    files = _files(data.train_file, settings, "train_file", nano_file="train")
    held_out = _held_out(settings)
    begun = _begin(settings, folder, files, held_out)
    assembled = _assemble(settings)
    table = scores.Table.open(folder, assembled) if settings.model.is_nano and not settings.data.train_file else None
    # All data is looked at before anything is trained: also that of the second stage before the first.
    captions = _captions(settings, assembled, folder)
    train, evaluation = _prepare(settings, assembled, assembled.template, files, held_out)
    shown = _some(held_out, evaluation, 12)
    before = scores.answers(assembled.model, assembled, shown) if shown else []
    if table:
        table.measure("untrained", assembled.model)
    _align(settings, assembled, folder, captions, begun)
    if table:
        table.measure("stage1", assembled.model)
    model = add_lora(
        assembled, r=settings.model.lora_r, alpha=settings.model.lora_alpha, dropout=settings.model.lora_dropout
    )
    if start:
        continue_adapter(model, start)
    config = _with_rate(settings.train, 2e-4)
    config.projector_lr = 2e-5 if config.projector_lr is None else config.projector_lr
    questions = _some(held_out, evaluation, config.eval_questions)
    stage = Stage("finetune", "Stage 2", assembled.template, train, evaluation, questions, folder, config, begun)
    trained = train_stage(stage, model, assembled)
    after = scores.answers(model, assembled, shown) if shown else []
    scores.write_samples(folder / "samples.json", shown, before, after)
    measured = table.finish(model) if table else {}
    _finish(folder, {**measured, "seconds": round(time.monotonic() - started, 1), **trained})
    if table:
        print("\n" + scores.format_table(measured))
    picture = shown[0].images[0] if shown and shown[0].images else "photo.jpg"
    _say_next(
        f"The run is done: {folder} (open {folder / 'report.html'} in a browser)",
        [
            f'qllava chat {folder} --image {picture} --prompt "{scores.asked(shown[0]) if shown else "What is this?"}"',
            f"qllava merge {folder} {folder}-merged",
            f"python demo/app.py --model {folder}",
        ],
    )
    return folder


def _captions(settings: Settings, assembled: Assembled, folder: Path) -> Prepared | None:
    """What a stage 1 of finetune's own would learn from; None where the projector has its start already."""
    exists = settings.model.model_name_or_path not in (None, NANO) and not settings.data.pretrain_file
    if settings.model.projector or exists or (folder / "stage1" / RESULTS_FILE).is_file():
        return None
    files = _files(settings.data.pretrain_file, settings, "pretrain_file", nano_file="pretrain")
    return _prepare(settings, assembled, PLAIN, files, [])[0]


def _align(
    settings: Settings, assembled: Assembled, folder: Path, captions: Prepared | None, begun: dict[str, Any]
) -> None:
    """Give the projector its start: a folder's, or a stage 1 of its own; a LLaVA that exists already has one."""
    stage1 = folder / "stage1"
    if captions is None:
        if settings.model.projector:
            load_projector(assembled.model, Path(settings.model.projector))
        elif (stage1 / RESULTS_FILE).is_file():
            load_projector(assembled.model, stage1)
        return
    started = time.monotonic()
    stage1.mkdir(exist_ok=True)
    config = copy.copy(settings.train)
    config.output_dir = str(stage1)
    config.learning_rate = 1e-3
    if settings.model.is_nano:
        for name, value in NANO_PRETRAIN.items():
            setattr(config, name, value)
    stage = Stage("pretrain", "Stage 1", PLAIN, captions, None, [], stage1, config, begun)
    train_stage(stage, train_projector_only(assembled), assembled)
    assembled.model.requires_grad_(False)
    _finish(stage1, {"seconds": round(time.monotonic() - started, 1)})
    with (folder / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write((stage1 / METRICS_FILE).read_text(encoding="utf-8"))


# What nano needs, found by trying: it is a thousandth of a 7B and learns at higher rates, without recomputation.
NANO_PRETRAIN: dict[str, Any] = {
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 32,
    "num_train_epochs": 1.0,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_strategy": "no",
}
NANO_FINETUNE: dict[str, Any] = {
    "lora_r": 32,
    "lora_alpha": 64,
    "learning_rate": 1e-3,
    "projector_lr": 1e-3,
    "per_device_train_batch_size": 24,
    "num_train_epochs": 1.0,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "save_steps": 200,
    "save_total_limit": 2,
}


def _assemble(settings: Settings) -> Assembled:
    """The model of the settings. Raises InputError when they contradict each other."""
    model = settings.model
    built = bool(model.language_model or model.vision_tower)
    if model.model_name_or_path and built:
        raise InputError("Give either model_name_or_path, or language_model with vision_tower; not both.")
    start = adapter_at(model.model_name_or_path)
    set_seed(settings.train.seed)
    if not torch.cuda.is_available():
        keep_freed_memory()
    # `plain` is for captions; the model itself keeps the template in which it will be asked.
    template = model.template if model.template != "plain" else None
    if start:
        return assemble(_same_base(settings, start), seed=settings.train.seed)
    recipe = Recipe(
        model=None if built or model.is_nano else _absolute(model.model_name_or_path),
        language_model=NANO if model.is_nano else _absolute(model.language_model),
        vision_tower=NANO if model.is_nano else _absolute(model.vision_tower),
        projector_type=model.projector_type,  # type: ignore[arg-type]
        vision_feature_layer=model.vision_feature_layer,
        image_aspect=model.image_aspect,  # type: ignore[arg-type]
        template=template or "",
        load_in_4bit=model.load_in_4bit,
    )
    return assemble(recipe, seed=settings.train.seed)


def _absolute(name: str | None) -> str | None:
    """A folder by its whole path: the run's record is read from other places too."""
    folder = Path(name).expanduser() if name else None
    return str(folder.absolute()) if folder is not None and folder.is_dir() else name


def _same_base(settings: Settings, start: Path) -> Recipe:
    """The base of an adapter that is trained on. Raises InputError for a setting that would make it another one."""
    record = read_record(start)
    for name in BELONGS_TO_BASE:
        if getattr(settings.model, name) != getattr(record, name):
            raise InputError(
                f"The adapter in {start} was trained with {name} {getattr(record, name)}; leave the setting out, or "
                "merge the run and start from the merged model."
            )
    # What the base is held in is this device's matter.
    return replace(record, dtype="")


def _open_folder(settings: Settings) -> Path:
    """Make or reopen the run's folder. Raises InputError for a finished run."""
    folder = Path(str(settings.train.output_dir))
    for given in (settings.model.model_name_or_path, settings.model.projector):
        if given and Path(given).exists() and Path(given).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{given} lies in output_dir, which is {folder}; choose another output_dir.")
    if (folder / RESULTS_FILE).is_file() and not settings.train.overwrite_output_dir:
        raise InputError(f"{folder} holds a finished run; choose another output_dir, or set overwrite_output_dir.")
    try:
        if settings.train.overwrite_output_dir and (folder / "run.yaml").is_file():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if settings.model.is_nano:
            settings.model.model_name_or_path = NANO
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise InputError(f"The run cannot be written to {folder}: {error.strerror or error}.") from error
    return folder


def _begin(settings: Settings, folder: Path, files: list[Part], held_out: list[Part]) -> dict[str, Any]:
    """What decides a run of finetune, in both stages. Raises InputError when a checkpoint has it otherwise.

    Writes `data.json` (the rows by their bytes: model cards name them) and `run.yaml`.
    """
    hashes = hashes_of(files)
    captions = (
        parts_of(settings.data.pretrain_file, _images(settings), "pretrain_file") if settings.data.pretrain_file else []
    )
    begun = begun_with(settings, [*hashes, *hashes_of(captions)])
    for place in (folder / "stage1", folder):
        refuse_changes(place, begun)
    (folder / DATA_FILE).write_text(json.dumps([*hashes, *hashes_of(held_out)], indent=2) + "\n", encoding="utf-8")
    _write_settings(settings, folder)
    return begun


def _write_settings(settings: Settings, folder: Path) -> None:
    """Write `run.yaml`."""
    resolved = {**asdict(settings.model), **asdict(settings.data), **settings.train.to_dict()}  # type: ignore[no-untyped-call]
    (folder / "run.yaml").write_text(yaml.safe_dump(_plain(resolved), sort_keys=False), encoding="utf-8")


def _plain(value: Any) -> Any:
    """The same value in types that every YAML reader knows."""
    return json.loads(json.dumps(value, default=str))


def _with_rate(config: TrainConfig, rate: float) -> TrainConfig:
    """The settings with the stage's own learning rate where none was given."""
    config = copy.copy(config)
    config.learning_rate = rate if config.learning_rate is None else config.learning_rate
    return config


def _images(settings: Settings) -> Path | None:
    return Path(settings.data.image_folder) if settings.data.image_folder else None


def _files(given: Any, settings: Settings, field: str, *, nano_file: str) -> list[Part]:
    """The files of a setting, or nano's own where none is given and the parts are nano's."""
    if given is not None:
        return parts_of(given, _images(settings), field)
    if not settings.model.is_nano:
        raise InputError(f"The setting {field} is missing: give a file of rows (nano alone brings its own).")
    data = nano.prepare()
    return [Part(getattr(data, nano_file), data.folder)]


def _held_out(settings: Settings) -> list[Part]:
    """The held-out rows of stage 2; nano has its own, for its own training rows."""
    if settings.data.eval_file:
        return parts_of(settings.data.eval_file, _images(settings), "eval_file")
    if settings.model.is_nano and not settings.data.train_file:
        data = nano.prepare()
        return [Part(data.validation, data.folder)]
    return []


def _prepare(
    settings: Settings, assembled: Assembled, template: Template, files: list[Part], held_out: list[Part]
) -> tuple[Prepared, Prepared | None]:
    """Check and open the rows, as this model reads them."""
    encoder = Encoder(
        assembled.processor.tokenizer,
        template,
        assembled.model.config.image_token_index,
        tokens_per_image(assembled.model.config),
        settings.train.max_length or 1 << 30,
        settings.data.too_long,  # type: ignore[arg-type]
    )
    seed, skip = settings.train.seed, settings.data.skip_check
    return prepare(files, encoder, seed=seed, evaluation=held_out, skip_check=skip)


def _some(held_out: list[Part], prepared: Prepared | None, count: int) -> list[Example]:
    """At most `count` held-out rows, evenly spaced, to be asked as questions."""
    if prepared is None:
        return []
    each = -(-count // len(held_out))
    read = zip(held_out, prepared.parts, strict=True)
    return [e for part, found in read for e in read_some(part.path, part.image_folder, each, found.summary.rows)]


def _finish(folder: Path, results: dict[str, Any]) -> None:
    """Write results and report; `results.json` comes last, because it marks the run as finished."""
    aside = folder / f".{RESULTS_FILE}"
    aside.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    aside.rename(folder / RESULTS_FILE)
    write_report(folder)
    if adapter_at(str(folder)):
        write_card(folder, folder, read_record(folder), "peft", [ABOUT_ADAPTER.format(folder=folder.name)])


def _say_next(done: str, commands: list[str]) -> None:
    print(f"\n{done}\nNext:")
    for command in commands:
        print(f"  {command}")


def main(run: Callable[[Settings], Path], settings: Callable[[], Settings]) -> int:
    """Run a recipe: errors that a user can mend are one sentence on stderr and status 1, signals have their own."""
    try:
        with handled():
            run(settings())
    except Stopped as stopped:
        print(f"qllava: {stopped}", file=sys.stderr)
        return stopped.status
    except InputError as error:
        # One that was raised in a worker of the data loader comes with its stack trace as text, the message last.
        sentence = str(error).splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")
        print(f"qllava: {sentence}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"qllava: {error.filename or 'a file'} cannot be written or read: {error.strerror or error}.",
            file=sys.stderr,
        )
        return 1
    return 0
